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
from shiftnet.kernels.shift import shift
from shiftnet.kernels.shift import tpu as shift_tpu
from shiftnet.kernels.shift_block import shift_block
from shiftnet.kernels.shift_block import tpu as block_tpu
from shiftnet.kernels.shift_pointwise import tpu as pointwise_tpu

_cases = selftest._cases
# The rest takes the interpreter minutes; test_tpu.py has it in smaller pieces.
BLOCK = {"shift_block": "those of 4x8 pixels at stride 1"}
WITHIN_REACH = {
    "shift": "those of 4x8 pixels at stride 1",
    "packed_matmul": "those of 7 levels",
}


def within_reach(platform, operation, reach=WITHIN_REACH):
    return [c for c in _cases("tpu", operation) if c[0] == reach.get(operation)]


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch):
    monkeypatch.setattr(selftest, "_note_of", lambda platform: None)
    for module in (shift_tpu, block_tpu, pointwise_tpu, packed_tpu):
        for name in {"shift", "forward", "backward", "matmul"} & set(vars(module)):
            run = functools.partial(getattr(module, name), interpret=True)
            monkeypatch.setattr(module, name, run)
    selftest.failures.cache_clear()
    yield
    selftest.failures.cache_clear()


@pytest.mark.parametrize("reach", [WITHIN_REACH, pytest.param(BLOCK, marks=pytest.mark.slow)])
def test_right_kernels_are_trusted(reach, monkeypatch):
    monkeypatch.setattr(selftest, "_cases", functools.partial(within_reach, reach=reach))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert selftest.failures("tpu") == {}


@pytest.mark.parametrize("fault", ["wrong", "raises"])
def test_an_operation_whose_kernels_are_wrong_is_named_and_left_out_alone(fault, monkeypatch):
    def broken(x, dh, dw):
        if fault == "raises":
            raise RuntimeError("no such instruction\nand a long dump")
        return x

    monkeypatch.setattr(shift_tpu, "shift", broken)
    monkeypatch.setattr(selftest, "_cases", lambda *of: within_reach(*of) if "shift" in of else [])
    reason = {
        "wrong": "those of 4x8 pixels at stride 1 are off by .*",
        "raises": "RuntimeError: no such instruction",
    }[fault]
    with pytest.warns(RuntimeWarning, match=f"the tpu kernels of shift are left out.*: {reason}$"):
        assert set(selftest.failures("tpu")) == {"shift"}
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    x, w = jnp.ones((4, 4, 16, 128)), jnp.ones((16, 16))
    moved = str(jax.make_jaxpr(lambda x: shift(x, layout="HWCN"))(x))
    assert "pallas_call" not in moved
    block = str(jax.make_jaxpr(lambda x: shift_block(x, w, w[0], w, layout="HWCN"))(x))
    assert "pallas_call" in block
    assert implementations.best_layout(128) == "HWCN"


def test_a_gpus_kernels_are_tested_in_other_processes(monkeypatch):
    with pytest.warns(RuntimeWarning, match="the gpu kernels of \\w+ are left out"):
        found = selftest.failures("gpu")  # there is none here: what the process found is passed on
    assert list(found) == list(selftest.OPERATIONS)
    assert all(reason.startswith("ValueError") for reason in found.values())
    monkeypatch.setattr(selftest, "OPERATIONS", ("shift",))
    monkeypatch.setattr(selftest, "PATIENCE", 1e-3)
    assert selftest._compare_apart("gpu") == {"shift": "their test did not end within 0.001 s"}


def test_a_kernel_that_ends_its_process_takes_no_other_with_it(monkeypatch):
    program = (
        "import os, sys\n"
        "for name in sys.argv[1:]:\n"
        "    if name == 'shift': os.abort()\n"
        "    print(f'[\"{name}\", null]', flush=True)"
    )
    run = subprocess.run

    def aborts(command, **options):
        return run([sys.executable, "-c", program, *command[4:]], **options)

    monkeypatch.setattr(subprocess, "run", aborts)
    found = selftest._compare_apart("gpu")
    assert list(found) == ["shift"]
    assert found["shift"].startswith("their test ended with -6")


def test_what_was_found_is_noted(tmp_path, monkeypatch):
    compared = []

    def compare(platform, operation):
        compared.append(operation)
        return "wrong" if operation == "shift" else None

    monkeypatch.setattr(selftest, "_compare", compare)
    monkeypatch.setattr(selftest, "_note_of", lambda platform: tmp_path / platform)
    for _ in range(2):
        with pytest.warns(RuntimeWarning, match=f"noted in {tmp_path / 'tpu'}"):
            assert selftest.failures("tpu") == {"shift": "wrong"}
        selftest.failures.cache_clear()
    assert compared == list(selftest.OPERATIONS)
    (tmp_path / "tpu").write_text("cut o")
    with pytest.warns(RuntimeWarning, match="shift"):
        selftest.failures("tpu")
    assert len(compared) == 2 * len(selftest.OPERATIONS)


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
