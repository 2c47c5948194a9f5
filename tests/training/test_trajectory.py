"""Five steps of training go where the original's go."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from shiftnet.config import default_config
from shiftnet.interchange import torch_names
from shiftnet.training.mesh import compiled_quickly, make_mesh
from shiftnet.training.optimizer import make_optimizer
from shiftnet.training.step import Program, TrainState
from tests import networks, oracle

RTOL = 1e-11  # of the largest value; rounding gives up to 8e-13
MOBILE_RTOL = 1e-9  # rounding errors grow from block to block


def train(case: oracle.Case) -> tuple[list[float], nnx.Module]:
    """The loss before each step of the case, and the network after the last."""
    hyper = case.hyper
    plan = hyper["sgd"]["plan"]  # [epoch, steps]; the original's momentum restarts at each
    config = default_config()
    config.model.update(networks.model_config(hyper))
    config.optimizer.weight_decay = hyper["sgd"]["weight_decay"]
    config.batch_size = hyper["batch"]
    steps_per_epoch = plan[0][1]
    program = Program(
        config,
        num_classes=hyper["num_classes"],
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        steps_per_epoch=steps_per_epoch,
        mesh=make_mesh(hyper["batch"]),
    )
    optimizer = make_optimizer(config, steps_per_epoch)
    update = compiled_quickly(program.update, program.mesh)  # five steps take less than compiling
    _, params, stats = nnx.split(networks.of_case(case), nnx.Param, nnx.BatchStat)
    batches = zip(case.arrays["xs"].astype(np.float64), case.arrays["labels"], strict=True)
    losses = []
    for epoch, steps in plan:
        start = jnp.asarray(epoch * steps_per_epoch, jnp.int32)
        opt_state = optax.tree.set(optimizer.init(params), count=start)
        state = TrainState(start, params, stats, opt_state)
        for _ in range(steps):
            x, labels = next(batches)
            images = jnp.asarray(networks.channels_last(x))
            state, loss, _ = update(state, images, jnp.asarray(labels))
            losses.append(float(loss))
        params, stats = state.params, state.stats
    return losses, nnx.merge(program.graphdef, params, stats)


# Each of them takes up to half a minute to compile. Of one step tests/models/test_networks.py shows
# all; what several add is the optimizer's and the same for every network.
SLOW = [
    "cifar_d20_c10",
    "d20_w1_c10_bin",
    "d8_w1_c10_float",
    "d8_w2_c100_bin",
    "depthwise_noskip20_r0.38_c10",
    "depthwiseresnet20_r1.12_c10",
    "mobile20_r1.12_c10",
    "recipe_d14_c10",
    "resnet20_block2.8_c100",
    "resnet20_c10",
    "resnet20_net2.8_c10",
    "shiftresnet20_e1_c10",
    "shiftresnet20_e3_c100",
    "shuffle20_r0.38_c100",
]


@oracle.every_case(
    "net", "net_removed", "wrn", "s3net", only=lambda hyper: "sgd" in hyper, slow=SLOW
)
@pytest.mark.usefixtures("float64")
def test_five_steps_of_training_are_the_originals(group, name, subtests):
    case = oracle.case(group, name)
    losses, model = train(case)
    ours = torch_names.to_torch(model, networks.naming(case.hyper))
    theirs = case.part("sgd/")
    rtol = MOBILE_RTOL if name.startswith("mobile") else RTOL

    with subtests.test("losses"):
        assert len(losses) == 5
        oracle.assert_near({"loss": np.array(losses)}, {"loss": theirs["loss"]}, rtol)
    with subtests.test("logits afterwards"):
        logits = networks.evaluate(model, case.arrays["xs"][0].astype(np.float64))
        expected = {"logits": theirs["final_eval_logits"]}
        oracle.assert_near({"logits": logits}, expected, rtol)
    with subtests.test("some parameters, number by number"):
        final = oracle.part(theirs, "final/")
        assert len(final) >= 5
        oracle.assert_near(ours, final, rtol)
    with subtests.test("every parameter and running statistic, by its summary"):
        summaries = dict(zip(case.hyper["final_stats_names"], theirs["final_stats"], strict=True))
        summaries = {n: s for n, s in summaries.items() if not n.endswith("num_batches_tracked")}
        assert sorted(ours) == sorted(summaries)
        oracle.assert_summaries_near(ours, summaries, rtol)
