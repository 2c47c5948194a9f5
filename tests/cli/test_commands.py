"""The commands and shiftnet.load as a user meets them."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import shiftnet
from shiftnet import checkpoint, cli, data
from shiftnet.__main__ import main as shiftnet_main
from shiftnet.cli import COMMANDS, convert, evaluate, export, train
from shiftnet.config import GROUPS, MOST_USED
from shiftnet.data import augment
from shiftnet.errors import UserError, reported
from shiftnet.training import metrics

ROOT = Path(__file__).parents[2]
QUICKSTART = str(ROOT / "configs/quickstart.py")
SMALL = [
    "--config.model.arch=shiftresnet8",
    "--config.model.expansion=1",
    "--config.batch_size=128",
    "--config.log.tensorboard=false",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The working directory of a run of one epoch."""
    workdir = tmp_path_factory.mktemp("run")
    arguments = ["--config", QUICKSTART, "--workdir", str(workdir), "--config.epochs=1", *SMALL]
    assert train.main(arguments) == 0
    return workdir


def _json(capsys, *arguments: str) -> list[dict]:
    capsys.readouterr()
    assert evaluate.main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_evaluate_gives_the_accuracy_that_training_logged(run, capsys):
    (row,) = _json(capsys, "--ckpt", str(run), "--per-class")
    (line,) = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
    assert row["top1"] == line["test_accuracy"]
    assert row["top5"] == line["test_top5"]
    assert row["loss"] == pytest.approx(line["test_loss"], rel=1e-5)
    assert row["images"] == 355
    counts = np.bincount(data.load("digits").test.labels)
    hits = [row["per_class"][str(digit)]["accuracy"] * counts[digit] for digit in range(10)]
    assert sum(hits) == pytest.approx(row["top1"] * 355)


def test_a_glob_evaluates_every_checkpoint_it_matches(run, capsys):
    rows = _json(capsys, "--ckpt", f"{run}/*e[s]t*")  # best and, in it, its only step
    assert [row["checkpoint"] for row in rows] == [str(checkpoint.find(run / "best"))]
    both = _json(capsys, "--ckpt", str(run), str(run / "best"))
    assert len(both) == 2


def test_evaluate_prints_a_line_that_a_person_can_read(run, capsys):
    assert evaluate.main(["--ckpt", str(run)]) == 0
    out = capsys.readouterr().out
    assert "shiftresnet8 on digits, 355 images: top-1 " in out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--ckpt", "no/such/run"], "no/such/run does not exist"),
        (["--ckpt", "no/such/*"], "no file matches --ckpt 'no/such/*'"),
        (["--ckpt", str(ROOT / "tests")], "no checkpoint in"),
        (["--ckpt", "RUN", "--dataset", "digit"], "did you mean 'digits'?"),
        (["--ckpt", "RUN", "--batch-size", "0"], "--batch-size"),
        (["--ckpt", "RUN", "--jsn"], "--json"),
        ([], "--ckpt"),
    ],
)
def test_evaluate_answers_bad_input_with_a_sentence(run, capsys, arguments, sentence):
    assert evaluate.main([str(run) if a == "RUN" else a for a in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert sentence in error


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--config.model.arch=shiftresnet21"], "shiftresnet20 and shiftresnet26"),
        (["--config.model.arch=shiftresent20"], "did you mean 'shiftresnet20'?"),
        (["--config.data.name=digit"], "did you mean 'digits'?"),
        (["--config.optimizer.learning=1"], "config.optimizer"),
        (["--coordinator=localhost:1"], "go together"),
    ],
)
def test_train_answers_bad_input_with_a_sentence_and_writes_nothing(
    tmp_path, capsys, arguments, sentence
):
    workdir = tmp_path / "run"
    assert train.main(["--config", QUICKSTART, "--workdir", str(workdir), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert sentence in error
    assert not workdir.exists()


@pytest.mark.parametrize(
    ("main", "arguments", "sentence"),
    [
        (evaluate.main, ["--ckpt", "./" + "x" * 300], "File name too long"),
        (evaluate.main, ["--ckpt", "a\nb\x1b"], "a\\nb\\x1b does not exist"),
        (convert.main, ["a\nb"], "a\\nb: cannot be read, No such file"),
    ],
)
def test_a_path_that_no_file_can_have_is_told_in_one_line(
    tmp_path, monkeypatch, capsys, main, arguments, sentence
):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert sentence in error
    assert error.removesuffix("\n").isprintable()


def test_an_internal_error_of_the_system_keeps_its_traceback():
    @reported
    def main():
        raise OSError(22, "Invalid argument")

    with pytest.raises(OSError, match="Invalid argument"):
        main()


def test_a_name_that_the_terminal_cannot_show_is_no_error(capsys):
    @reported
    def main():
        print("runs/\udcff")
        return 0

    assert main() == 0
    assert capsys.readouterr().out == "runs/\\udcff\n"


@pytest.mark.parametrize("out", ["file/x.npz", "folder.npz", "x" * 255 + ".npz"])
def test_export_tells_of_a_place_that_cannot_be_written(run, tmp_path, capsys, out):
    (tmp_path / "file").touch()
    (tmp_path / "folder.npz").mkdir()
    assert export.main([str(run), str(tmp_path / out)]) == 2
    assert capsys.readouterr().err.startswith(f"error: cannot write {tmp_path / out}: ")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder.npz"]


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    series = checkpoint.CheckpointManager(tmp_path)
    series.save(1, {"other": 1}, model={"x": jnp.zeros(3)})
    series.close()
    with pytest.raises(UserError, match="not one of shiftnet's"):
        checkpoint.read(tmp_path)


def test_load_returns_a_network_that_predicts(run):
    model = shiftnet.load(run)
    images = data.load("digits").test.images[:7]
    predictions = model.predict(images)
    assert model.config.model.arch == "shiftresnet8"
    assert predictions.probabilities.shape == (7, 10)
    np.testing.assert_allclose(predictions.probabilities.sum(1), 1, rtol=1e-5)
    np.testing.assert_array_equal(predictions.classes, predictions.probabilities.argmax(1))
    assert predictions.names == [str(c) for c in predictions.classes]

    x = augment.normalize(jnp.asarray(images), model.mean, model.std)
    np.testing.assert_allclose(
        jax.nn.softmax(model(x)), predictions.probabilities, rtol=1e-4, atol=1e-6
    )
    in_threes = model.predict(images, batch_size=3)
    np.testing.assert_allclose(
        in_threes.probabilities, predictions.probabilities, rtol=1e-4, atol=1e-6
    )
    assert model.predict(images[:0]).names == []


def test_logits_come_in_the_precision_of_the_input(run):
    model = shiftnet.load(run)
    x = np.random.default_rng(0).standard_normal((2, 32, 32, 3))
    single = model(x.astype(np.float32))
    assert single.dtype == np.float32
    assert model(jnp.asarray(x, jnp.bfloat16)).dtype == jnp.bfloat16
    with jax.enable_x64(True):
        double = shiftnet.load(run)(x)
    assert double.dtype == np.float64
    np.testing.assert_allclose(single, double, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("images", [np.zeros((2, 32, 32, 3)), np.zeros((32, 32, 3), np.uint8)])
def test_predict_says_what_it_wants(run, images):
    with pytest.raises(ValueError, match=r"expected uint8 \[N, H, W, 3\], got"):
        shiftnet.load(run).predict(images)


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)],
)
def test_a_signal_saves_and_says_how_to_go_on(tmp_path, number, code):
    workdir = tmp_path / "run"
    command = [sys.executable, "train.py", "--config", QUICKSTART, "--workdir", str(workdir)]
    command += [*SMALL, "--config.log.every_seconds=0"]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if line.startswith("epoch 1/") and "  step " in line:
            process.send_signal(number)
            break
    out, err = process.communicate(timeout=120)
    assert process.returncode == code, err
    assert "Traceback" not in err
    saved = checkpoint.find(workdir)
    assert f"stopped after step {saved.name}, saved" in out
    assert f"to continue: {shlex.join(['python', *command[1:]])}" in out


def test_ctrl_c_while_the_step_is_compiled_ends_in_one_line(tmp_path):
    command = [sys.executable, "train.py", "--config", QUICKSTART, "--workdir", str(tmp_path)]
    process = subprocess.Popen(
        [*command, *SMALL],
        cwd=ROOT,
        env=os.environ | {"PYTHONUNBUFFERED": "1", "JAX_ENABLE_COMPILATION_CACHE": "false"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if line.startswith("compiling the training step"):
            process.send_signal(signal.SIGINT)
            break
    _, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (130, "interrupted\n")


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("train.py", "python train.py 'a b'"),
        ("/usr/bin/shiftnet", "shiftnet train 'a b'"),
        ("x/shiftnet/__main__.py", "python -m shiftnet train 'a b'"),
    ],
)
def test_a_hint_is_a_command_as_it_was_typed(program, expected):
    assert cli.typed("train", ["a b"], program=program) == expected


@pytest.mark.parametrize(
    ("job", "sentence"),
    [
        (("x", "2", "0"), "--coordinator must be HOST:PORT with a port from 1 to 65535, found 'x'"),
        (("h:0", "2", "0"), "found 'h:0'"),
        (("h:1", "9" * 30, "0"), "--num-processes must be from 1 to"),
        (("h:1", "2", "2"), "--process-id must be from 0 to 1, found 2"),
    ],
)
def test_a_job_that_cannot_be_is_a_sentence(tmp_path, capsys, job, sentence):
    options = ("--coordinator", "--num-processes", "--process-id")
    arguments = [word for pair in zip(options, job, strict=True) for word in pair]
    workdir = tmp_path / "run"
    code = train.main(["--config", QUICKSTART, "--workdir", str(workdir), *arguments])
    assert code == 2
    assert sentence in capsys.readouterr().err
    assert not workdir.exists()


def test_a_damaged_recipe_in_the_working_directory_is_named(tmp_path, capsys):
    (tmp_path / "config.json").write_bytes(b"\xff{")
    assert train.main(["--config", QUICKSTART, "--workdir", str(tmp_path), *SMALL]) == 2
    assert f"{tmp_path / 'config.json'} is damaged" in capsys.readouterr().err
    assert (tmp_path / "config.json").read_bytes() == b"\xff{"


@pytest.mark.slow
def test_a_run_goes_on_with_more_devices_and_with_fewer(tmp_path):
    workdir = str(tmp_path / "run")
    for epochs, (devices, divided) in enumerate([(1, False), (8, True), (2, False)], 1):
        command = [sys.executable, "train.py", "--config", QUICKSTART, "--workdir", workdir, *SMALL]
        command += [f"--config.epochs={epochs}", "--config.model.expansion=9"]
        command += ["--config.batch_size=64", f"--config.parallel.fsdp={divided}"]
        result = subprocess.run(
            command,
            cwd=ROOT,
            env=os.environ | {"JAX_NUM_CPU_DEVICES": str(devices)},
            capture_output=True,
            text=True,
            check=True,
        )
        assert f"{devices} x cpu" in result.stdout
        assert ("continuing after step" in result.stdout) == (epochs > 1)
    lines = metrics.read(tmp_path / "run")
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    assert lines[0]["train_loss"] > lines[1]["train_loss"] > lines[2]["train_loss"]


def test_a_python_without_the_packages_is_a_sentence(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "jax", None)
    monkeypatch.delitem(sys.modules, "shiftnet.cli.count", raising=False)
    assert shiftnet_main(["count", "--arch", "shiftresnet8"]) == 2
    assert f"jax is not installed for {sys.executable}; docs/inst" in capsys.readouterr().err


def test_importing_the_package_imports_neither_jax_nor_tensorflow():
    code = "import shiftnet, sys; print([m for m in ('jax', 'tensorflow') if m in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("command", [(), ("--help",), ("help",)])
def test_the_command_without_a_subcommand_lists_them(capsys, command):
    assert shiftnet_main(command) == 0
    out = capsys.readouterr().out
    for name, summary in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(summary)}$", out, re.M)


def test_a_mistyped_subcommand_is_answered_with_the_nearest(capsys):
    assert shiftnet_main(["trian"]) == 2
    assert "unknown subcommand 'trian'; did you mean 'train'?" in capsys.readouterr().err


@pytest.mark.parametrize("name", COMMANDS)
def test_every_subcommand_explains_itself_under_its_own_name(capsys, name):
    with pytest.raises(SystemExit) as exit_:
        shiftnet_main([name, "--help"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: shiftnet {name} ")


@pytest.mark.parametrize(
    ("script", "main", "usage"),
    [
        ("train.py", train.main, "usage: train.py "),
        ("/there/evaluate.py", evaluate.main, "usage: evaluate.py "),
        ("convert_torch.py", convert.main, "usage: python -m shiftnet.convert_torch "),
    ],
)
def test_a_script_explains_itself_under_its_own_name(capsys, monkeypatch, script, main, usage):
    monkeypatch.setattr(sys, "argv", [script])
    with pytest.raises(SystemExit):
        main(["--help"])
    assert capsys.readouterr().out.startswith(usage)


def test_trains_help_shows_what_people_change_most_before_the_rest(capsys):
    with pytest.raises(SystemExit):
        train.main(["--help"])
    out = capsys.readouterr().out
    most_used = [out.index(f"--config.{path} ") for path in MOST_USED]
    assert most_used == sorted(most_used)
    groups = [out.index(f"\n{name} settings:\n") for name in GROUPS]
    assert groups == sorted(groups)
    assert out.index("--workdir") < most_used[0]
    assert most_used[-1] < groups[0]
    assert groups[-1] < out.index("--coordinator")


def test_a_recipe_with_a_colon_in_its_path_has_a_workdir_of_its_name(tmp_path, monkeypatch):
    (tmp_path / "a:b").mkdir()
    (tmp_path / "a:b" / "dig.py").touch()
    monkeypatch.chdir(tmp_path)
    assert train._default_workdir("a:b/dig.py") == "runs/dig"
    assert train._default_workdir("a:b/dig.py:expansion=3") == "runs/dig-expansion=3"
    assert train._default_workdir("configs/x_c10.py:expansion=3") == "runs/x_c10-expansion=3"
