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
    group: str,
    only: Callable[[Mapping[str, Any]], bool] = lambda hyper: True,
    core: Iterable[str] = (),
) -> pytest.MarkDecorator:
    """Runs a test, which takes `name`, for every case of a group, or skips it once.

    Args:
      group: as in the manifest.
      only: leaves out the cases whose hyper-parameters it does not hold for.
      core: the names of those that get the mark `core`.
    """
    if not FOLDER.is_dir():
        return pytest.mark.parametrize("name", [pytest.param("", id="none", marks=needed)])
    names = [c["name"] for c in _manifest() if c["group"] == group and only(c["hyper"])]
    assert names, f"the oracle has no group {group!r}"
    assert set(core) <= set(names)
    return pytest.mark.parametrize(
        "name", [pytest.param(n, marks=pytest.mark.core if n in core else ()) for n in names]
    )


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
