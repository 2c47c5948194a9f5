"""What decides whether a device's kernels are used, with the interpreter in the device's place."""

import functools
import subprocess
import sys
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
WITHIN_REACH = (
    "shift_block of 4x8 pixels at stride 1",
    "shift of 4x8 pixels at stride 1",
    "packed_matmul of 7 levels",
)


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch):
    monkeypatch.setattr(selftest, "_note_of", lambda platform: None)
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
    shift = [case for case in _cases("tpu") if case[0].startswith("shift of")]
    monkeypatch.setattr(selftest, "_cases", lambda _: shift)
    reason = {"wrong": "shift of .* is off by", "raises": "RuntimeError: no such instruction$"}[
        fault
    ]
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


def test_a_gpus_kernels_are_tested_in_a_process_of_their_own(monkeypatch):
    with pytest.warns(RuntimeWarning, match="the gpu kernels are left out"):
        reason = selftest.failure("gpu")  # there is none here: what the process found is passed on
    assert reason.startswith("ValueError")
    monkeypatch.setattr(selftest, "PATIENCE", 1e-3)
    assert selftest._compare_apart("gpu") == "their test did not end within 0.001 s"
    monkeypatch.undo()
    run = subprocess.run

    def aborts(command, **options):
        return run([sys.executable, "-c", "import os; os.abort()"], **options)

    monkeypatch.setattr(subprocess, "run", aborts)
    assert selftest._compare_apart("gpu").startswith("their test ended with -6")


def test_that_kernels_were_right_is_noted(tmp_path, monkeypatch):
    compared = []
    monkeypatch.setattr(selftest, "_compare", compared.append)
    monkeypatch.setattr(selftest, "_note_of", lambda platform: tmp_path / platform)
    for _ in range(2):
        assert selftest.failure("tpu") is None
        selftest.failure.cache_clear()
    assert compared == ["tpu"]


def test_the_note_is_of_the_device_and_the_sources(tmp_path, monkeypatch):
    monkeypatch.undo()
    old = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    try:
        note = selftest._note_of("gpu")
        assert note.parent == tmp_path
        assert note == selftest._note_of("gpu") != selftest._note_of("tpu")
    finally:
        jax.config.update("jax_compilation_cache_dir", old)


def test_the_environment_can_do_without_kernels():
    program = "from shiftnet.kernels.implementations import is_only_xla; print(is_only_xla())"
    for value, expected in (("1", "True"), ("0", "False"), ("", "False")):
        environment = {"PATH": "", "JAX_PLATFORMS": "cpu", "SHIFTNET_ONLY_XLA": value}
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True
        )
        assert done.stdout.strip() == expected
