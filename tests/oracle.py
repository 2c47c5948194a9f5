"""The numbers that the original PyTorch code gave, and how ours are held against them.

They lie beside the checkout in ../shared/oracle. Tests that need them are skipped where that
folder is missing, and say so; tests/golden holds a few small ones for everybody.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

FOLDER = Path(__file__).resolve().parents[2] / "shared" / "oracle"
GOLDEN = Path(__file__).resolve().parent / "golden"

needed = pytest.mark.skipif(not FOLDER.is_dir(), reason="needs ../shared/oracle")

Arrays = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Case:
    """One run of the original code: what was run (`hyper`), and its arrays by name."""

    name: str
    hyper: Mapping[str, Any]
    arrays: Arrays

    def part(self, prefix: str) -> dict[str, np.ndarray]:
        """The arrays whose names start with `prefix`, without it."""
        return part(self.arrays, prefix)


def part(arrays: Arrays, prefix: str) -> dict[str, np.ndarray]:
    """The arrays whose names start with `prefix`, without it."""
    return {
        name.removeprefix(prefix): value
        for name, value in arrays.items()
        if name.startswith(prefix)
    }


def running(arrays: Arrays) -> dict[str, np.ndarray]:
    """The running means and variances; PyTorch's count of batches has no use here."""
    return {name: a for name, a in arrays.items() if name.endswith(("running_mean", "running_var"))}


def read(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz file."""
    with np.load(path) as file:
        return dict(file)


@functools.cache
def _manifest() -> list[dict[str, Any]]:
    return json.loads((FOLDER / "manifest.json").read_text())["cases"]


@functools.cache
def case(group: str, name: str) -> Case:
    """One case; the test that asks for it must be marked `needed`."""
    (entry,) = (c for c in _manifest() if (c["group"], c["name"]) == (group, name))
    return Case(name, entry["hyper"], read(FOLDER / entry["file"]))


def every_case(
    *groups: str,
    only: Callable[[Mapping[str, Any]], bool] = lambda hyper: True,
    core: Iterable[str] = (),
    slow: Iterable[str] = (),
) -> pytest.MarkDecorator:
    """Runs a test for every case of a group, or skips it once.

    A test of one group takes `name`; a test of several takes `group` and `name`.

    Args:
      groups: as in the manifest.
      only: leaves out the cases whose hyper-parameters it does not hold for.
      core: the names of those that get the mark `core`.
      slow: likewise.
    """
    arguments = ("group", "name")[-min(len(groups), 2) :]
    if not FOLDER.is_dir():
        nothing = pytest.param(*("" for _ in arguments), id="none", marks=needed)
        return pytest.mark.parametrize(arguments, [nothing])
    cases = [
        (case["group"], case["name"])
        for case in _manifest()
        if case["group"] in groups and only(case["hyper"])
    ]
    assert {group for group, _ in cases} == set(groups), f"the oracle lacks one of {groups}"
    marks = {"core": set(core), "slow": set(slow)}
    assert set().union(*marks.values()) <= {name for _, name in cases}
    return pytest.mark.parametrize(
        arguments,
        [
            pytest.param(
                *case[-len(arguments) :],
                id="-".join(case[-len(arguments) :]),
                marks=[getattr(pytest.mark, m) for m, names in marks.items() if case[1] in names],
            )
            for case in cases
        ],
    )


def recipe_weights(names: Iterable[tuple[str, Any]], seed: int) -> dict[str, np.ndarray]:
    """Weights that were not stored, drawn as the manifest's `fill_recipe` says, in float32.

    Args:
      names: the original's state dict in its order, names and shapes.
      seed: of the case.
    """
    draw = np.random.RandomState(seed)
    arrays: dict[str, np.ndarray] = {}
    low_bit = {name.removesuffix("_sign") for name, _ in names if name.endswith(".weight_sign")}
    fan_in: float | None = None  # of the convolution with latents that comes before a batch norm
    for name, shape in names:
        if name.endswith("weight_sign"):
            continue
        if name.endswith("num_batches_tracked"):
            draw.randint(1, 50)
            continue
        if name.endswith("running_mean"):
            value = 0.3 * draw.standard_normal(shape)
        elif name.endswith("running_var"):
            value = 0.3 + 1.7 * draw.random_sample(shape)
        elif len(shape) == 4:
            value = draw.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))
        elif len(shape) == 2:
            value = draw.standard_normal(shape) * np.sqrt(1 / shape[1])
        elif name.endswith("weight"):
            value = 0.5 + draw.random_sample(shape)
        else:
            value = 0.3 * draw.standard_normal(shape)
        arrays[name] = np.asarray(value).astype(np.float32)
        if len(shape) == 4 and name.endswith(".weight"):
            fan_in = float(np.prod(shape[1:])) if name in low_bit else None
        elif name.endswith("running_mean") and fan_in:
            arrays[name] = (arrays[name] * np.float32(np.sqrt(fan_in))).astype(np.float32)
        elif name.endswith("running_var") and fan_in:
            arrays[name] = (arrays[name] * np.float32(fan_in) * np.float32(2)).astype(np.float32)
    return arrays


def gaps(ours: Arrays, theirs: Arrays, *, zero: Iterable[str] = ()) -> dict[str, float]:
    """For each array of `theirs`, the largest difference over the array's largest magnitude.

    Args:
      ours: must have all names of `theirs`.
      theirs: the reference.
      zero: names whose true value is zero, so that both sides hold rounding errors alone. Those
        are measured by the largest magnitude of all arrays.
    """
    largest = {name: np.abs(value).max() for name, value in theirs.items()}
    scale = largest | dict.fromkeys(set(zero) & set(theirs), max(largest.values()))
    result = {}
    for name, value in theirs.items():
        assert ours[name].shape == value.shape, name
        difference = np.abs(ours[name].astype(np.float64) - value).max()
        result[name] = float(difference / scale[name]) if difference else 0.0
    return result


def assert_near(
    ours: Arrays, theirs: Arrays, rtol: float, *, zero: Iterable[str] = (), what: str = "values"
) -> None:
    """Asserts that no gap is above `rtol`; a NaN is."""
    far = {n: gap for n, gap in gaps(ours, theirs, zero=zero).items() if not gap <= rtol}
    assert not far, f"{what} differ by more than {rtol:g} of the largest: {far}"


def summary(array: np.ndarray) -> np.ndarray:
    """Three numbers that stand for an array: its sum, its length, and a sum with changing weights.

    The third notices what the first two do not, a change of order.
    """
    flat = array.ravel().astype(np.float64)
    weights = np.cos(0.37 * np.arange(flat.size) + 0.1)
    return np.array([flat.sum(), np.sqrt((flat**2).sum()), (flat * weights).sum()])


def assert_summaries_near(
    ours: Arrays, theirs: Arrays, rtol: float, *, zero: Iterable[str] = (), what: str = "summaries"
) -> None:
    """Like `assert_near`, where `theirs` holds the summaries of arrays.

    A sum is measured by the largest that an array of this length could have.
    """
    lengths = {name: value[1] for name, value in theirs.items()}
    lengths |= dict.fromkeys(set(zero) & set(theirs), max(lengths.values()))
    far = {}
    for name, value in theirs.items():
        root = np.sqrt(ours[name].size)
        scale = lengths[name] * np.array([root, 1, root])
        gap = np.abs(summary(ours[name]) - value) / np.where(scale == 0, 1, scale)
        if not gap.max() <= rtol:
            far[name] = gap
    assert not far, f"{what} differ by more than {rtol:g}: {far}"
