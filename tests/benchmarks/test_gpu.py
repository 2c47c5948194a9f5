"""One command for a GPU that is lent for minutes: what it keeps, however it ends."""

import json

import pytest

from benchmarks import gpu
from benchmarks.gpu import DRY, Step
from benchmarks.protocol import WorkerError


def steps_of(*runs):
    return [Step(f"step {i}", 60, run) for i, run in enumerate(runs)]


def test_a_command_that_is_cut_short_keeps_what_it_measured(tmp_path):
    out = tmp_path / "gpu.json"

    def measured(size, folder, seconds, keep):
        keep({"128": {"images_a_second": 1.0}})

    def fails(size, folder, seconds, keep):
        keep({"128": 2})
        raise WorkerError("a kernel hangs")

    def is_cut(size, folder, seconds, keep):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gpu.run(steps_of(measured, fails, is_cut), DRY, 60, out, tmp_path)
    first, second = (json.loads(out.read_text())["steps"][f"step {i}"] for i in range(2))
    assert first["result"] == {"128": {"images_a_second": 1.0}}
    assert second["result"] == {"128": 2}
    assert "a kernel hangs" in second["failed"]


def test_no_step_begins_that_there_is_no_time_for(tmp_path):
    given = []

    def step(size, folder, seconds, keep):
        given.append(seconds)

    report = gpu.run([*steps_of(step), Step("long", 600, step)], DRY, 40, None, tmp_path)
    assert len(given) == 2
    assert given[1] <= 40
    report = gpu.run(steps_of(step), DRY, gpu.LEAST_SECONDS - 1, None, tmp_path)
    assert report["skipped"] == ["step 0"]
    assert len(given) == 2


def test_a_target_is_met_on_its_device_only():
    rows = [
        {"key": "shift/e9/8x8x576", "reached": 0.9},
        {"key": "shift/e3/8x8x192", "failed": "no"},
    ]
    steps = {"device": {"result": {"device": "NVIDIA H200"}}, "kernels": {"result": {"rows": rows}}}
    (shift,) = (target for target in gpu.TARGETS if target.text.startswith("shift at"))
    assert ": met" in shift.verdict({"steps": steps})
    rows[0]["reached"] = 0.8
    assert ": MISSED" in shift.verdict({"steps": steps})
    steps["device"]["result"]["device"] = "cpu"
    assert ": unmeasured" in shift.verdict({"steps": steps})
    assert ": unmeasured" in shift.verdict({"steps": {}})


@pytest.mark.slow
def test_every_step_runs_in_miniature(tmp_path):
    out = tmp_path / "gpu.json"
    assert gpu.main(["--dry", "--json", str(out)]) == 0
    report = json.loads(out.read_text())
    assert list(report["steps"]) == [step.name for step in gpu.STEPS]
    assert not report["skipped"]
    for entry in report["steps"].values():
        assert "failed" not in entry
        assert entry["result"]
