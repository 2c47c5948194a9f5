"""Whole networks, against the original's: logits, loss, every gradient, running statistics."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests import networks, oracle

RTOL = 1e-12  # of the largest value; rounding gives up to 8e-14
MOBILE_RTOL = 1e-9  # its gradients grow from block to block, and the rounding errors with them


@oracle.every_case(
    *("net", "net_removed", "wrn", "s3net"),
    core=["shiftresnet20_e3_c100", "d8_w1_c10_float"],
    slow=[
        "cifar_d20_c10",
        "depthwise_noskip20_r0.38_c10",
        "d20_w1_c10_bin",
        "d8_w2_c100_bin",
        "mobile20_r1.12_c10",
        "optional_resnet20_net2.8_c10_in40x36",
        "recipe_d14_c10",
        "resnet20_c10",
        "resnet20_net2.8_c10",
        "shiftresnet20_e1_c10",
        "shuffle20_r0.38_c100",
    ],
)
@pytest.mark.usefixtures("float64")
def test_network_computes_and_learns_as_the_original(group, name, subtests):
    case = oracle.case(group, name)
    arrays = case.arrays
    rtol = MOBILE_RTOL if name.startswith("mobile") else RTOL
    x, labels = arrays["xs"][0].astype(np.float64), arrays["labels"][0]
    loss = networks.cross_entropy(labels)
    model = networks.of_case(case)
    logits = networks.evaluate(model, x)
    ours = networks.differentiate(
        model,
        x,
        loss,
        train=True,
        naming=networks.naming(case.hyper),
        regularizer=case.hyper.get("reg_alpha", 0.0),
    )
    zero = networks.zero_gradients(case.hyper, ours.grads)

    with subtests.test("evaluation"):
        oracle.assert_near(
            {"logits": logits, "loss": np.asarray(loss(jnp.asarray(logits)))},
            case.part("eval/"),
            rtol,
        )
    with subtests.test("training"):
        outputs = {"logits": ours.output, "loss": ours.loss, "grad_x": ours.grad_input}
        theirs = {name: arrays[f"train/{name}"] for name in outputs}
        oracle.assert_near({k: np.asarray(v) for k, v in outputs.items()}, theirs, rtol)
    with subtests.test("some gradients, number by number"):
        theirs = case.part("train/grad/")
        assert len(theirs) >= 5
        oracle.assert_near(ours.grads, theirs, rtol, zero=zero)
    with subtests.test("every gradient, by its summary"):
        names = case.hyper["grad_names"]
        assert sorted(ours.grads) == sorted(names)
        theirs = dict(zip(names, arrays["train/grad_stats"], strict=True))
        oracle.assert_summaries_near(ours.grads, theirs, rtol, zero=zero)
    with subtests.test("running statistics"):
        theirs = oracle.running(case.part("train/stats/"))
        assert sorted(ours.stats) == sorted(theirs)
        oracle.assert_near(ours.stats, theirs, rtol)
