"""Plans for devices that are not here: their numbers against counts by hand, and their errors."""

import dataclasses
import importlib.util
import math
import re

import jax
import pytest

from shiftnet.cli import train
from shiftnet.errors import UserError
from shiftnet.kernels.implementations import only_xla
from shiftnet.planning import chips, hlo, plan
from tests.training.small import recipe

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason='libtpu is not installed; `pip install "jax[tpu]"` brings the one that JAX wants',
)

# A WRN-8 of width 1 for 10 classes, by hand. Channels of its batch norms: two in each of three
# blocks, one after them, and the last one, which alone has parameters.
CHANNELS = (16 + 16) + (16 + 32) + (32 + 64) + 64 + 10
WEIGHTS = 9 * (3 * 16 + 2 * 16 * 16 + 16 * 32 + 32 * 32 + 32 * 64 + 64 * 64) + 64 * 10
PARAMETERS = WEIGHTS + 2 * 10
# Gradients; for each batch norm two sums forwards and two backwards, of which the last one's are
# gradients already; the loss, and how many images were right.
REDUCED = 4 * (PARAMETERS + 2 * CHANNELS + 2 * (CHANNELS - 10) + 2)
# Convolutions at 32x32, 16x16 and 8x8 pixels, zeros of the padding included.
MULTIPLY_ADDS = (
    32 * 32 * 9 * (3 * 16 + 2 * 16 * 16)
    + 16 * 16 * 9 * (16 * 32 + 32 * 32)
    + 8 * 8 * (9 * (32 * 64 + 64 * 64) + 64 * 10)
)


def wrn8(**overrides):
    return recipe(model__arch="wrn8", **overrides)


def step_here(**overrides):
    """A step of 64 images for each of the devices that the tests have."""
    here = chips.CHIPS["v5e"]._replace(platform="cpu", kernels="cpu")
    facts = plan.Facts(images=1442, classes=10, side=32, resident=True)
    with only_xla():  # the compiler counts no operation of the C++
        return plan.compile_step(wrn8(**overrides), facts, here, jax.devices(), 64)


def test_an_epoch_has_the_recipes_steps_whatever_batch_is_tried():
    # Of 64 images on each device there would be one to three steps, of the recipe's eight 180.
    with jax.numpy_dtype_promotion("standard"):  # as outside of these tests
        assert step_here(batch_size=8, optimizer__accumulate=100, epochs=1, schedule__boundaries=())


def test_a_step_holds_and_sends_what_one_counts_by_hand():
    step = step_here()
    # Parameters, momentum, statistics, two counters; not the seed, as nothing random is drawn.
    state = 4 * (2 * PARAMETERS + 2 * CHANNELS + 2)
    assert step.memory.arguments == state + 64 * (32 * 32 * 3 + 4)
    assert step.memory.outputs < 1000  # all but the loss takes the place of an argument
    assert step.memory.data == 1442 * (32 * 32 * 3 + 4)
    assert hlo.by_kind(step.collectives).keys() == {"all-reduce"}
    assert hlo.by_kind(step.collectives)["all-reduce"][1] == REDUCED
    n = len(jax.devices())
    assert step.sent == pytest.approx(REDUCED * 2 * (n - 1) / n)
    assert step.flops == 6 * 64 * MULTIPLY_ADDS
    # The compiler counts no padding, and all that is not a product.
    assert step.compiler_flops == pytest.approx(step.flops, rel=0.1)


def test_a_divided_state_is_planned_as_it_is_trained():
    """FSDP divides the two largest weights, the only ones of 2**14 values or more."""
    divided = 9 * (32 * 64 + 64 * 64)
    whole, fsdp = (step_here(parallel__fsdp=fsdp) for fsdp in (False, True))
    share = 1 - 1 / len(jax.devices())
    saved = whole.memory.arguments - fsdp.memory.arguments
    assert saved == 4 * 2 * divided * share  # of the parameters and their momentum
    assert "all-gather" in hlo.by_kind(fsdp.collectives)


@pytest.mark.slow
@needs_libtpu
def test_the_command_plans_for_a_tpu_that_is_not_here(tmp_path, monkeypatch, capsys):
    recipe_file = tmp_path / "wrn8.py"
    recipe_file.write_text(
        "from tests.planning.test_plan import wrn8\n\n\n"
        "def get_config():\n    return wrn8(batch_size=1440)\n"
    )
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)
    arguments = ["--config", str(recipe_file), "--plan", "v5e:2x4"]
    assert train.main([*arguments, "--profile"]) == 2
    assert "--profile does not apply to --plan" in capsys.readouterr().err
    assert train.main(arguments) == 0
    assert not list(empty.iterdir())
    printed = capsys.readouterr().out
    cells = dict(re.findall(r"^(\S.*?)  +(\S.*)$", printed, re.MULTILINE))
    assert cells["devices"] == "8"
    assert cells["images per device"] == "180"
    assert cells["fits"] == "yes"
    assert cells["all-reduce: operands"] == f"{REDUCED / 1000:.4g} kB"
    assert cells["FLOPs of products"] == f"{6 * 180 * MULTIPLY_ADDS / 1e9:.4g} GFLOP"
    assert cells["largest batch that fits"] == "1,440"
    assert "best-case estimates" in printed


def step_of(batch: int, total: int, **fields) -> plan.Step:
    held = plan.Memory(arguments=0, temporaries=total, outputs=0, code=0, data=0)
    return plan.Step(
        **{"batch": batch, "memory": held, "flops": 1, "compiler_flops": None, "traffic": 0}
        | {"collectives": ()}
        | fields
    )


class Compiler:
    """Steps that hold `fixed + each * images` bytes, and whether it ran out at `breaks`.

    From each of the batches in `saves` on, it finds a way to hold so much less.
    """

    def __init__(self, each, fixed=0, breaks=math.inf, saves=()):
        self.each, self.fixed, self.breaks, self.saves = each, fixed, breaks, saves
        self.tried = []

    def __call__(self, batch):
        self.tried.append(batch)
        saved = sum(less for start, less in self.saves if batch >= start)
        held = self.fixed + self.each * batch - saved
        return step_of(batch, held) if batch < self.breaks else None


@pytest.mark.parametrize(
    ("compiler", "batch", "limit", "most", "found"),
    [
        (Compiler(each=10), 16, 10_000, 10**6, 1000),
        (Compiler(each=10, fixed=5000), 16, 10_000, 10**6, 496),
        (Compiler(each=10, fixed=5000), 16, 5_500, 10**6, 48),
        (Compiler(each=10), 16, 10**6, 360, 360),  # the whole training set
        (Compiler(each=10), 16, 75, 10**6, 7),  # the recipe's own batch does not fit
        (Compiler(each=10, breaks=100), 16, 1_300, 10**6, 96),
        (Compiler(each=10, breaks=100), 400, 10**6, 10**6, 96),
        (Compiler(each=10, fixed=5000), 16, 4_000, 10**6, 0),
        (Compiler(10, breaks=2000, saves=[(900, 1500), (1100, 1400)]), 16, 10_000, 10**6, 1280),
        (Compiler(each=0, breaks=0), 16, 10**6, 10**6, 0),
    ],
)
def test_the_largest_batch_is_one_that_was_compiled_and_fits(compiler, batch, limit, most, found):
    first = compiler(batch)
    assert plan.largest(compiler, first, batch, limit, most) == found
    assert not found or found in compiler.tried
    assert len(compiler.tried) <= 5


def planned(monkeypatch, step, names=("v5e:2x4",), **overrides):
    """The estimates with a compiler that gives `step`, and for how many devices it was asked."""
    asked = []

    def compile_step(config, facts, chip, devices, batch):
        asked.append(len(devices))
        return step and dataclasses.replace(step, batch=batch)

    def devices(name):
        kind, _, size = name.partition(":")
        return chips.CHIPS[kind], jax.devices()[:1] * chips.CHIPS[kind].topologies[size]

    monkeypatch.setattr(plan, "compile_step", compile_step)
    monkeypatch.setattr(chips, "devices", devices)
    return plan.plan(wrn8(**overrides), names), asked


def test_the_slowest_of_compute_memory_and_network_says_how_fast(monkeypatch):
    reduced = hlo.Collective("all-reduce", group=8, nbytes=800_000, times=2)
    step = step_of(16, 10**9, flops=197 * 10**9, traffic=819 * 10**7, collectives=[reduced])
    (one,), _ = planned(monkeypatch, step, epochs=3)
    assert one.seconds == pytest.approx(
        {"compute": 0.001, "memory": 0.010, "network": 2 * 2 * 7 / 8 * 800_000 / 200e9}
    )
    assert one.bound == "memory"
    assert one.images_per_second == pytest.approx(128 / 0.010)
    assert one.hours == pytest.approx(3 * (1442 // 128) * 0.010 / 3600)
    assert one.fits


def test_the_largest_batch_is_searched_once_for_each_chip(monkeypatch):
    step = step_of(16, 20 * 10**9)
    (small, large, other), asked = planned(monkeypatch, step, ["v5e:2x4", "v5e:4x4", "v6e:2x2"])
    assert asked.count(16) == 1
    assert (small.fits, large.fits, other.fits) == (False, False, True)
    assert (small.largest, large.largest) == (0, 0)
    assert other.largest % 4 == 0
    assert 128 <= other.largest <= 1442


def test_what_does_not_fit_is_said(monkeypatch, tmp_path, capsys):
    recipe_file = tmp_path / "wrn8.py"
    recipe_file.write_text(
        "from tests.planning.test_plan import wrn8\n\n\ndef get_config():\n    return wrn8()\n"
    )
    planned(monkeypatch, None)  # a compiler that always runs out
    assert train.main(["--config", str(recipe_file), "--plan", "v5e:2x4,h200:8"]) == 1
    printed = capsys.readouterr()
    assert re.search(r"^fits +NO +NO$", printed.out, re.MULTILINE)
    assert re.search(r"^largest batch that fits +0 +0$", printed.out, re.MULTILINE)
    assert "error: does not fit into the memory of v5e:2x4, h200:8\n" in printed.err


@pytest.mark.parametrize("name", ["v5e", "v5e:3x3", "tpu:2x2", "h200:16", "", "v5e:2x2,"])
def test_an_unknown_topology_lists_the_known_ones(name):
    with pytest.raises(
        UserError, match=r"unknown topology .*v5e:1x1\|2x2.*; h100:1\|2\|4\|8; h200:1\|2\|4\|8$"
    ):
        plan.parse(name)


@pytest.mark.parametrize("name", ["v5e:2x2", "h200:8"])
def test_a_missing_compiler_says_what_to_install(name, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    with pytest.raises(UserError, match=r'pip install "jax\[\w+\]"$'):
        plan.plan(wrn8(), [name])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"batch_size": 100}, "batch_size 100 does not divide over 8 devices"),
        ({"batch_size": 1600}, "batch_size 1600 is more than the 1442 training images"),
        ({"data__validation": 2000}, "data.validation is 2000"),
        ({"data__name": "cifar11"}, "unknown dataset 'cifar11'"),
    ],
)
def test_what_could_not_be_trained_is_not_compiled(overrides, message, monkeypatch):
    monkeypatch.setattr(chips, "devices", lambda name: (chips.CHIPS["v5e"], jax.devices() * 4))
    monkeypatch.setattr(plan, "compile_step", None)
    with pytest.raises(UserError, match=re.escape(message)):
        plan.plan(wrn8(**overrides), ["v5e:2x4"])


@pytest.mark.parametrize(
    ("name", "facts"),
    [
        ("cifar10", plan.Facts(50_000, 10, 32, True)),
        ("cifar100", plan.Facts(50_000, 100, 32, True)),
        ("digits", plan.Facts(1_442, 10, 32, True)),
        ("imagenet2012", plan.Facts(1_281_167, 1000, 32, False)),  # what the network takes
    ],
)
def test_data_sets_are_known_without_a_download(name, facts):
    assert plan._facts(wrn8(data__name=name)) == facts
