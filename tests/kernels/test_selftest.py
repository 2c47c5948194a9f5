"""What decides whether a device's kernels are used, with functions of JAX in the kernels' place."""

import dataclasses
import functools
import json
import socket
import subprocess
import sys
import textwrap
import warnings

import jax
import jax.numpy as jnp
import pytest

from shiftnet.kernels import operation, selftest, shift, shift_block, shift_pointwise
from shiftnet.kernels.operation import OPERATIONS, Case, Kernel, Operation, choices


def forward(x, w, *, factor):
    return factor * (x @ w)


def backward(x, w, dy, *, factor):
    return factor * (dy @ w.T), factor * jnp.einsum("nhwc,nhwk->ck", x, dy)


def wrong(x, w, dy, *, factor):
    dx, dw = backward(x, w, dy, factor=factor)
    return dx, dw.at[3].set(0)


def raises(*_, factor):
    raise RuntimeError("no such instruction\nand a long dump")


def made(name, gradient):
    case = Case(((2, 4, 4, 8), (8, 8)), {"factor": 2})
    kernels = {"tpu": Kernel(forward, gradient)}
    return Operation(name, forward, kernels, images=(True, False), cases=[case])


@pytest.fixture(autouse=True)
def _on_a_tpu(monkeypatch, tmp_path):
    monkeypatch.setattr(selftest, "_stored_in", lambda platform: tmp_path / platform)
    monkeypatch.setattr(selftest, "_outcomes", {})
    monkeypatch.setattr(selftest, "_answers", {})
    monkeypatch.setattr(operation, "OPERATIONS", {})
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")


@pytest.fixture
def tested(monkeypatch):
    """The operations that were tested, in order."""
    found, compare = [], selftest.compare
    monkeypatch.setattr(
        selftest, "compare", lambda platform, o: (found.append(o.name), compare(platform, o))[1]
    )
    return found


def traced(one):
    """What a program takes that is traced now."""
    with choices() as seen:
        jax.make_jaxpr(lambda x, w: one(x, w, factor=2))(jnp.ones((2, 4, 4, 8)), jnp.ones((8, 8)))
    return seen


SLOW = [pytest.param(module, marks=pytest.mark.slow) for module in (shift_pointwise, shift_block)]


@pytest.mark.parametrize("module", [shift, *SLOW])
def test_right_kernels_are_trusted(module, recwarn):
    of_networks = module.OPERATION
    kernel = of_networks.kernels["tpu"]
    interpreted = {
        part: functools.partial(getattr(kernel, part), interpret=True)
        for part in (("forward", "backward") if module is not shift else ("forward",))
    }
    kernels = {"tpu": dataclasses.replace(kernel, **interpreted)}
    one = dataclasses.replace(of_networks, kernels=kernels, cases=of_networks.cases[:1])
    if module is shift:  # whose gradient is the same kernel
        move = interpreted["forward"]
        gradient = lambda x, dy, dh, dw: (move(dy, dh=-dh, dw=-dw),)  # noqa: E731
        kernels["tpu"] = dataclasses.replace(kernels["tpu"], backward=gradient)
    assert selftest.decide([one]) == {}
    assert not recwarn


def test_an_operation_whose_kernels_are_wrong_is_named_and_left_out_alone():
    good, bad = made("good", backward), made("bad", wrong)
    with pytest.warns(
        RuntimeWarning, match="the tpu kernels of bad are left out.*: with x"
    ) as told:
        assert set(operation.decide()) == {"bad"}
    assert len(told) == 1
    assert traced(good) == ["good: tpu"]
    (line,) = traced(bad)
    assert line.startswith("bad: xla, since with x (2, 4, 4, 8) and {'factor': 2} they are off by")


def test_kernels_are_tested_when_they_are_first_traced(tested):
    one = made("one", wrong)
    with pytest.warns(RuntimeWarning, match="the tpu kernels of one are left out"):
        assert traced(one)[0].startswith("one: xla")
    traced(one)
    assert tested == ["one"]


def test_a_mismatch_is_stored_and_tested_again_when_asked(tested, tmp_path, monkeypatch):
    one, other = made("one", backward), made("other", wrong)
    with pytest.warns(RuntimeWarning, match=f"stored in {tmp_path / 'tpu'}"):
        found = operation.decide()
    selftest._outcomes.clear()  # as in another process
    assert operation.decide() == found
    assert tested == ["one", "other"]
    with pytest.warns(RuntimeWarning, match="other"):
        assert operation.decide(again=True) == found
    assert tested == ["one", "other"] * 2
    (tmp_path / "tpu").write_text("cut o")
    selftest._outcomes.clear()
    with pytest.warns(RuntimeWarning, match="other"):
        assert operation.decide() == found
    assert json.loads((tmp_path / "tpu").read_text())["one"] is None
    del one, other


@pytest.mark.parametrize("fault", ["raises", "time-out"])
def test_a_busy_moment_does_not_leave_kernels_out_for_ever(fault, tmp_path, monkeypatch, tested):
    if fault == "raises":
        one = made("one", raises)
    else:
        one = dataclasses.replace(made("one", backward), kernels={"gpu": Kernel(forward, backward)})
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        monkeypatch.setattr(selftest, "PATIENCE", 1e-3)
    reason = {
        "raises": "RuntimeError: no such instruction",
        "time-out": "their test did not end within 0.001 s",
    }[fault]
    with pytest.warns(RuntimeWarning, match=reason):
        assert operation.decide() == {"one": reason}
    assert operation.decide() == {"one": reason}  # in this process
    selftest._outcomes.clear()
    with pytest.warns(RuntimeWarning, match=reason):
        operation.decide()
    assert len(tested) == (2 if fault == "raises" else 0)
    del one


def test_a_program_is_traced_anew_when_a_test_comes_out_otherwise():
    one = made("one", raises)
    jitted = jax.jit(lambda x, w: one(x, w, factor=2))
    arrays = jnp.ones((2, 4, 4, 8)), jnp.ones((8, 8))
    with pytest.warns(RuntimeWarning, match="left out"), choices() as seen:
        jitted.trace(*arrays)
    assert seen[0].startswith("one: xla")
    made("one", backward)  # takes its name
    operation.decide(again=True)
    with choices() as seen:
        jitted.trace(*arrays)
    assert seen == ["one: tpu"]


def test_a_gpus_kernels_are_tested_in_other_processes(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(operation, "OPERATIONS", OPERATIONS)
    with pytest.warns(RuntimeWarning, match="the gpu kernels of \\w+ are left out"):
        found = operation.decide()  # there is none here: what the process found is passed on
    assert {"shift", "shift_pointwise", "shift_block"} <= set(found)
    assert all(reason.startswith("ValueError") for reason in found.values())


def test_a_kernel_that_ends_its_process_takes_no_other_with_it(monkeypatch):
    program = (
        "import os, sys\n"
        "for place in sys.argv[1:]:\n"
        "    name = place.split(':')[1]\n"
        "    if name == 'second': os.abort()\n"
        "    print(f'[\"{name}\", null, true]', flush=True)"
    )
    run = subprocess.run

    def aborts(command, **options):
        return run([sys.executable, "-c", program, *command[4:]], **options)

    monkeypatch.setattr(subprocess, "run", aborts)
    operations = [made(name, backward) for name in ("first", "second", "third")]
    found = selftest._compare_apart("gpu", operations)
    assert found["first"] == found["third"] == (None, True)
    assert found["second"].reason.startswith("their test ended with -6")
    assert not found["second"].lasting


def test_processes_that_did_not_decide_together_take_no_kernel(monkeypatch, tested):
    one = made("one", backward)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    (line,) = traced(one)
    assert line.startswith("one: xla, since this job of many processes did not call")
    assert tested == []


def test_all_processes_of_a_job_follow_the_first_one():
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = found.getsockname()[1]
    program = textwrap.dedent(
        """
        import sys, jax
        jax.distributed.initialize(f"localhost:{sys.argv[1]}", 2, int(sys.argv[2]))
        from shiftnet.kernels import operation, selftest
        from shiftnet.kernels.shift import shift
        jax.devices()
        jax.default_backend = lambda: "tpu"
        selftest._stored_in = lambda platform: None
        outcome = selftest.Outcome(f"process {jax.process_index()} says so", True)
        selftest.compare = lambda platform, operation: outcome
        print(operation.decide())
        """
    )
    command = [sys.executable, "-W", "ignore", "-c", program, str(port)]
    both = [
        subprocess.Popen([*command, str(process)], stdout=subprocess.PIPE, text=True)
        for process in range(2)
    ]
    printed = [process.communicate(timeout=120)[0].splitlines()[-1] for process in both]
    assert printed == ["{'shift': 'process 0 says so'}"] * 2


def test_what_is_stored_is_of_the_device_and_the_sources(tmp_path, monkeypatch):
    monkeypatch.undo()
    old = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    try:
        file = selftest._stored_in("gpu")
        assert file.parent == tmp_path
        assert file == selftest._stored_in("gpu") != selftest._stored_in("tpu")
    finally:
        jax.config.update("jax_compilation_cache_dir", old)


def test_a_cpu_tests_nothing(monkeypatch):
    monkeypatch.undo()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert operation.decide() == {}


def test_the_environment_can_do_without_kernels():
    program = "from shiftnet.kernels.implementations import is_only_xla; print(is_only_xla())"
    for value, expected in (("1", "True"), ("0", "False"), ("", "False")):
        environment = {"PATH": "", "JAX_PLATFORMS": "cpu", "SHIFTNET_ONLY_XLA": value}
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True
        )
        assert done.stdout.strip() == expected
