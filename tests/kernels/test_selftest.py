"""What decides whether a device's kernels are used, with the interpreter in the device's place."""

import functools
import warnings

import jax
import jax.numpy as jnp
import pytest

from shiftnet.kernels import implementations, selftest
from shiftnet.kernels.packed_matmul import tpu as packed_tpu
from shiftnet.kernels.shift import tpu as shift_tpu
from shiftnet.kernels.shift_block import shift_block
from shiftnet.kernels.shift_block import tpu as block_tpu
from shiftnet.kernels.shift_pointwise import tpu as pointwise_tpu

_cases = selftest._cases
# The rest takes the interpreter minutes; test_tpu.py has it in smaller pieces.
WITHIN_REACH = ("shift_block at stride 1", "shift", "packed_matmul of 7 levels")


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch):
    for module in (shift_tpu, block_tpu, pointwise_tpu, packed_tpu):
        for name in {"shift", "forward", "backward", "matmul"} & set(vars(module)):
            run = functools.partial(getattr(module, name), interpret=True)
            monkeypatch.setattr(module, name, run)
    failure = selftest.failure
    failure.cache_clear()
    yield
    failure.cache_clear()


def test_right_kernels_are_trusted(monkeypatch):
    monkeypatch.setattr(
        selftest, "_cases", lambda _: [c for c in _cases("tpu") if c[0] in WITHIN_REACH]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert selftest.failure("tpu") is None


@pytest.mark.parametrize("fault", ["wrong", "raises"])
def test_others_are_left_out_and_named(fault, monkeypatch):
    def broken(x, dh, dw):
        if fault == "raises":
            raise RuntimeError("no such instruction\nand a long dump")
        return x

    monkeypatch.setattr(shift_tpu, "shift", broken)
    shift = [case for case in _cases("tpu") if case[0] == "shift"]
    monkeypatch.setattr(selftest, "_cases", lambda _: shift)
    reason = {"wrong": "shift is off by", "raises": "RuntimeError: no such instruction$"}[fault]
    with pytest.warns(RuntimeWarning, match=f"the tpu kernels are left out.*: {reason}"):
        assert selftest.failure("tpu")
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    x, w = jnp.ones((4, 4, 16, 128)), jnp.ones((16, 16))
    program = str(jax.make_jaxpr(lambda x: shift_block(x, w, w[0], w, layout="HWCN"))(x))
    assert "pallas_call" not in program


def test_a_kernel_that_is_trusted_is_used(monkeypatch):
    monkeypatch.setattr(selftest, "failure", lambda platform: None)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    x, w = jnp.ones((4, 4, 16, 128)), jnp.ones((16, 16))
    program = str(jax.make_jaxpr(lambda x: shift_block(x, w, w[0], w, layout="HWCN"))(x))
    assert "pallas_call" in program
    assert implementations.best_layout(128) == "HWCN"
