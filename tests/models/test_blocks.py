"""The residual blocks, against the original's: outputs, gradients, running statistics."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from shiftnet.interchange import torch_names
from shiftnet.models.depthwiseresnet import DepthwiseBlock
from shiftnet.models.resnet import BasicBlock
from shiftnet.models.shiftresnet import ShiftConvBlock
from tests import networks, oracle

pytestmark = pytest.mark.core

BLOCKS = {
    "ShiftConv": ShiftConvBlock,
    "BasicBlock": BasicBlock,
    "DepthWiseWithSkipBlock": DepthwiseBlock,
}
RTOL = 1e-13  # of the largest value; rounding gives up to 2.4e-15


def build(hyper, weights: oracle.Arrays, dtype) -> nnx.Module:
    """The block of a case, with its weights."""
    block = nnx.eval_shape(
        lambda: BLOCKS[hyper["cls"]](
            hyper["in_planes"],
            hyper["out_planes"],
            hyper["stride"],
            middle_features=hyper["mid_planes"],
            rngs=nnx.Rngs(0),
        )
    )
    torch_names.from_torch(block, {name: w.astype(dtype) for name, w in weights.items()})
    return block


def run(hyper, arrays: oracle.Arrays, dtype, *, train: bool) -> networks.Result:
    block = build(hyper, oracle.part(arrays, "sd/"), dtype)
    cotangent = jnp.asarray(networks.channels_last(arrays["cotangent"]).astype(dtype))
    return networks.differentiate(
        block, arrays["x"].astype(dtype), lambda y: (y * cotangent).sum(), train=train
    )


def zero_gradients(names, *, train: bool) -> list[str]:
    """Biases that a batch normalisation right behind them takes away again."""
    return [name for name in names if train and name == "bn2.bias" and "bn3.bias" in names]


def check(group: str, name: str, mode: str) -> None:
    case = oracle.case(group, name)
    train = mode == "train"
    ours = run(case.hyper, case.arrays, np.float64, train=train)
    theirs = case.part(f"{mode}/")
    oracle.assert_near(
        {"y": ours.output, "grad_x": ours.grad_input},
        {"y": theirs["y"], "grad_x": theirs["grad_x"]},
        RTOL,
    )
    grads = oracle.part(theirs, "grad/")
    assert set(ours.grads) == set(grads)
    oracle.assert_near(ours.grads, grads, RTOL, zero=zero_gradients(grads, train=train))
    # Evaluation leaves the running statistics as they were.
    stats = oracle.running(case.part("train/stats/" if train else "sd/"))
    assert set(ours.stats) == set(stats)
    oracle.assert_near(ours.stats, stats, RTOL)


@oracle.every_case("block_shiftconv")
@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.usefixtures("float64")
def test_shift_block_computes_and_learns_as_the_original(name, mode):
    check("block_shiftconv", name, mode)


@oracle.every_case("block_basic")
@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.usefixtures("float64")
def test_resnet_block_computes_and_learns_as_the_original(name, mode):
    check("block_basic", name, mode)


@oracle.every_case("block_depthwise")
@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.usefixtures("float64")
def test_depthwise_block_computes_and_learns_as_the_original(name, mode):
    check("block_depthwise", name, mode)


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.usefixtures("float64")
def test_shift_block_computes_and_learns_as_the_original_in_a_clone(mode):
    check_golden(np.float64, mode, RTOL)


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_shift_block_computes_and_learns_as_the_original_in_float32(mode):
    check_golden(np.float32, mode, 1e-5)


def check_golden(dtype, mode: str, rtol: float) -> None:
    golden = oracle.read(oracle.GOLDEN / "block_shiftconv_i16_o32_s2_e1_8x8.npz")
    hyper = {
        "cls": "ShiftConv",
        "in_planes": 16,
        "out_planes": 32,
        "stride": 2,
        "mid_planes": 32,
    }
    ours = run(hyper, golden, dtype, train=mode == "train")
    assert ours.output.dtype == dtype
    theirs = oracle.part(golden, f"{mode}/")
    outputs = {"y": ours.output, "grad_x": ours.grad_input}
    oracle.assert_summaries_near(outputs, {name: theirs[name] for name in outputs}, rtol)
    grads = oracle.part(theirs, "grad/")
    assert set(ours.grads) == set(grads)
    oracle.assert_summaries_near(ours.grads, grads, rtol)
    stats = oracle.running(oracle.part(golden, "train/stats/" if mode == "train" else "sd/"))
    oracle.assert_near(ours.stats, stats, rtol)
