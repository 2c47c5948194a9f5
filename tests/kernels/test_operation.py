"""What all operations share: which implementation runs, why, and where."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import shiftnet.config
from shiftnet import models
from shiftnet.kernels.implementations import local_batch, lowered_for, only_xla
from shiftnet.kernels.operation import choices
from shiftnet.kernels.shift import shift
from shiftnet.kernels.shift_block import shift_block

X = jnp.ones((128, 8, 8, 16))
W1, W2 = jnp.ones((16, 144)), jnp.ones((144, 16))


def block(x):
    return shift_block(x, W1, W1[0], W2)


def test_a_compiled_function_heeds_only_xla_after_its_first_call():
    jitted = jax.jit(block)
    with choices() as seen:
        jitted(X)
    assert seen == ["shift_block: cpu"]
    with only_xla(), choices() as seen:
        jitted(X)
    assert seen == ["shift_block: xla, since it is asked for"]
    with choices() as seen:
        jitted(X)
    assert seen == []  # what was traced first serves again


def test_a_compiled_function_heeds_the_platform_after_its_first_call():
    traced = jax.jit(block)
    assert "pallas_call" not in str(traced.trace(X).jaxpr)
    with lowered_for("tpu"):
        assert "pallas_call" in str(traced.trace(X).jaxpr)


def test_a_gradient_taken_outside_only_xla_takes_no_kernel_either():
    with only_xla():
        _, pull = jax.vjp(block, X)
    with choices() as seen:
        pull(X)
    assert not any("cpu" in line for line in seen)


@pytest.mark.parametrize(
    ("platform", "x", "lines"),
    [
        ("gpu", X, ["shift_block: xla, since x is float32, not bfloat16"]),
        ("gpu", X.astype(jnp.bfloat16), ["shift_block: gpu"]),
        ("tpu", X, ["shift_block: tpu"]),
        ("tpu", X[:100], ["shift_block: xla, since the batch is 100, not a multiple of 128"]),
        ("cpu", X, ["shift_block: cpu"]),
    ],
)
def test_a_caller_learns_what_runs_and_why(platform, x, lines):
    w1, w2 = W1.astype(x.dtype), W2.astype(x.dtype)
    with lowered_for(platform), choices() as seen:
        for _ in range(2):  # each line once
            jax.make_jaxpr(lambda x: shift_block(x, w1, W1[0], w2))(x)
    assert seen == lines


def test_a_caller_learns_that_a_gradient_has_no_kernel():
    x, w1, w2 = (a.astype(jnp.bfloat16) for a in (X, W1, W2[:, :1]))
    with lowered_for("tpu"), choices() as seen:
        jax.make_jaxpr(jax.grad(lambda x: shift_block(x, w1, W1[0], w2).sum()))(x)
    assert seen == [
        "shift_block: tpu",
        "shift_block's gradient: xla, since libtpu 0.0.48 does not compile gradients of a single "
        "bfloat16 channel",
    ]


def test_what_no_device_has_a_kernel_for_is_said():
    with choices() as seen:
        jax.make_jaxpr(shift)(X)
    assert seen == ["shift: xla, since it has no cpu kernel"]


@pytest.mark.parametrize("set_mesh", [True, False])
def test_a_users_own_jit_over_a_divided_batch_gathers_no_activations(set_mesh):
    """By the compiled program: neither in the gradient of a ShiftResNet8 nor in its logits."""
    config = shiftnet.config.default_config()
    config.model.arch, config.model.expansion = "shiftresnet8", 9.0
    network = nnx.eval_shape(lambda: models.build(config.model, 10, rngs=nnx.Rngs(0)))
    graphdef, params, stats = nnx.split(network, nnx.Param, nnx.BatchStat)
    mesh = Mesh(np.array(jax.devices()), ("data",))

    def on(tree, *axes):
        place = NamedSharding(mesh, PartitionSpec(*axes))
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), tree)

    def logits(params, x, train):
        return nnx.merge(graphdef, params, on_device, copy=True)(x, train=train)

    on_device = jax.tree.map(lambda a: jnp.ones(a.shape, a.dtype), stats)
    images = on(jax.ShapeDtypeStruct((256, 32, 32, 3), jnp.float32), "data")
    operands = on(params), images
    gradient = jax.grad(lambda params, x: jnp.square(logits(params, x, True)).mean())
    for program in (gradient, lambda params, x: logits(params, x, False)):
        with choices() as seen:
            if set_mesh:
                with jax.set_mesh(mesh):
                    text = jax.jit(program).lower(*operands).compile().as_text()
            else:
                text = jax.jit(program).lower(*operands).compile().as_text()
        assert "shift_block: cpu" in seen
        assert "all-gather" not in text


def test_the_images_of_one_device_are_counted():
    mesh = Mesh(np.array(jax.devices()), ("data",))
    assert local_batch(X) == 128
    with jax.set_mesh(mesh):
        assert (local_batch(X), local_batch(X[:3])) == (64, 3)
    assert local_batch(jax.device_put(X, NamedSharding(mesh, PartitionSpec("data")))) == 64


@pytest.mark.parametrize("first", ["kernels", "shiftnet.kernels"])
def test_the_checkouts_kernels_are_shiftnets(first):
    program = (
        f"import {first}.shift_block, kernels.shift, kernels, shiftnet.kernels.shift\n"
        "import shiftnet.kernels.shift_block.cpu, kernels.shift_block.cpu\n"
        "from kernels.operation import OPERATIONS\n"
        "from shiftnet.kernels import operation\n"
        "assert kernels is shiftnet.kernels\n"
        "assert kernels.shift.shift is shiftnet.kernels.shift.shift\n"
        "assert kernels.shift_block.cpu is shiftnet.kernels.shift_block.cpu\n"
        "assert OPERATIONS is operation.OPERATIONS\n"
        "assert kernels.__name__ == kernels.__spec__.name == 'shiftnet.kernels'\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
