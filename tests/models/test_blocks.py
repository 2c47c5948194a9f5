"""The blocks, against the original's: outputs, gradients, running statistics."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from shiftnet.interchange import torch_names
from shiftnet.kernels.implementations import lowered_for
from shiftnet.models.depthwiseresnet import DepthwiseBlock
from shiftnet.models.mobileresnet import MobileBlock
from shiftnet.models.resnet import BasicBlock
from shiftnet.models.shiftresnet import ShiftConvBlock
from shiftnet.models.shuffleresnet import ShuffleBlock
from tests import networks, oracle

pytestmark = pytest.mark.core

BLOCKS = {
    "ShiftConv": ShiftConvBlock,
    "BasicBlock": BasicBlock,
    "DepthWiseWithSkipBlock": DepthwiseBlock,
    "DepthWiseBlock": functools.partial(DepthwiseBlock, skip=False),
    "MobileNetLikeBlock": MobileBlock,
    "ShuffleBlock": ShuffleBlock,
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


def zero_gradients(cls: str, *, train: bool) -> list[str]:
    """Biases that a batch normalisation right behind them takes away again."""
    return ["bn2.bias"] if train and cls.startswith("DepthWise") else []


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
    oracle.assert_near(ours.grads, grads, RTOL, zero=zero_gradients(case.hyper["cls"], train=train))
    # Evaluation leaves the running statistics as they were.
    stats = oracle.running(case.part("train/stats/" if train else "sd/"))
    assert set(ours.stats) == set(stats)
    oracle.assert_near(ours.stats, stats, RTOL)


@oracle.every_case("block_shiftconv")
@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.usefixtures("float64")
@pytest.mark.covering
def test_shift_block_computes_and_learns_as_the_original(name, mode):
    check("block_shiftconv", name, mode)


@oracle.every_case("block_basic")
@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.usefixtures("float64")
@pytest.mark.covering
def test_resnet_block_computes_and_learns_as_the_original(name, mode):
    check("block_basic", name, mode)


@oracle.every_case("block_depthwise")
@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.usefixtures("float64")
@pytest.mark.covering
def test_depthwise_block_computes_and_learns_as_the_original(name, mode):
    check("block_depthwise", name, mode)


@oracle.every_case(
    *("block_mobile", "block_shuffle", "block_depthwise_noskip"),
    slow=[
        *("i16_o32_s2_r1.12_8x8", "i16_o16_s1_r0.38_7x9", "i12_o20_s2_r0.5_9x7"),
        *("i16_o32_s2_r0.38_8x8", "i16_o16_s1_r0.13_7x9", "i12_o20_s2_r0.9_9x7"),
    ],
)
@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.usefixtures("float64")
@pytest.mark.covering
def test_a_block_that_was_removed_computes_and_learns_as_the_original(group, name, mode):
    check(group, name, mode)


GOLDEN = {
    "block_shiftconv_i16_o32_s2_e1_8x8": ("ShiftConv", 16, 32, 32),
    "block_depthwise_noskip_i12_o20_s2_r0.5_9x7": ("DepthWiseBlock", 12, 20, 40),
    "block_mobile_i12_o20_s2_r0.5_9x7": ("MobileNetLikeBlock", 12, 20, 40),
    "block_shuffle_i12_o20_s2_r0.9_9x7": ("ShuffleBlock", 12, 20, 20),
}


@pytest.mark.parametrize("name", GOLDEN)
@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.usefixtures("float64")
@pytest.mark.covering
def test_a_block_computes_and_learns_as_the_original_in_a_clone(name, mode):
    check_golden(name, np.float64, mode, RTOL)


@pytest.mark.usefixtures("float64")
def test_a_shuffle_block_is_the_original_where_its_shuffle_is_the_order_of_a_matrix():
    with lowered_for("tpu"):
        check_golden("block_shuffle_i12_o20_s2_r0.9_9x7", np.float64, "eval", RTOL)


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_shift_block_computes_and_learns_as_the_original_in_float32(mode):
    check_golden("block_shiftconv_i16_o32_s2_e1_8x8", np.float32, mode, 1e-5)


def check_golden(name: str, dtype, mode: str, rtol: float) -> None:
    golden = oracle.read(oracle.GOLDEN / f"{name}.npz")
    fields = ("cls", "in_planes", "out_planes", "mid_planes")
    hyper = {**dict(zip(fields, GOLDEN[name], strict=True)), "stride": 2}
    zero = zero_gradients(hyper["cls"], train=mode == "train")
    ours = run(hyper, golden, dtype, train=mode == "train")
    assert ours.output.dtype == dtype
    theirs = oracle.part(golden, f"{mode}/")
    outputs = {"y": ours.output, "grad_x": ours.grad_input}
    oracle.assert_summaries_near(outputs, {name: theirs[name] for name in outputs}, rtol)
    grads = oracle.part(theirs, "grad/")
    assert set(ours.grads) == set(grads)
    oracle.assert_summaries_near(ours.grads, grads, rtol, zero=zero)
    stats = oracle.running(oracle.part(golden, "train/stats/" if mode == "train" else "sd/"))
    oracle.assert_near(ours.stats, stats, rtol)
