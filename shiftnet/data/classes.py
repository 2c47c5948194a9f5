"""Matches the classes of a data set with those that a network knows: by name."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from shiftnet.data.parts import Source, Split
from shiftnet.errors import UserError

if TYPE_CHECKING:
    from shiftnet.data.images import Encoded


class Matching(NamedTuple):
    """The network's label of each class of a data set.

    Attributes:
      labels: int32 [classes of the data set].
      message: how they were matched, if not one to one in the same order; else empty.
    """

    labels: np.ndarray
    message: str


def match(
    known: Sequence[str], found: Sequence[str], *, numbers: bool, network: str, dataset: str
) -> Matching:
    """Matches classes by name; by position if the network's names are mere numbers.

    Args:
      known: the network's class names, by label.
      found: the data set's.
      numbers: whether the network's names 0, 1, 2, ... stand for names that are not known.
      network, dataset: what errors call them.

    Raises:
      UserError: if the data set has classes that the network does not know.
    """
    if tuple(known) == tuple(found):
        return Matching(np.arange(len(found), dtype=np.int32), "")
    if numbers and is_numbers(known):
        if len(known) != len(found):
            raise UserError(
                f"{network} knows its {len(known)} classes by number only, and {dataset} has "
                f"{len(found)}; expected as many"
            )
        return Matching(
            np.arange(len(found), dtype=np.int32),
            "classes matched by position, since the network knows them by number only",
        )
    labels = {name: label for label, name in enumerate(known)}
    if strange := [name for name in found if name not in labels]:
        raise UserError(
            f"{network} does not know {len(strange)} of the {len(found)} classes of {dataset} "
            f"({listed(strange)}); it knows {len(known)}: {listed(known)}"
        )
    part = f"{len(found)} of the network's {len(known)} classes"
    message = part if len(found) < len(known) else "classes in another order, matched by name"
    return Matching(np.array([labels[name] for name in found], np.int32), message)


def is_numbers(names: Sequence[str]) -> bool:
    """Tells whether the names are 0, 1, 2 and so on."""
    return list(names) == [str(label) for label in range(len(names))]


def listed(names: Sequence[str], most: int = 10) -> str:
    """Returns names with commas between them; those beyond `most` are only counted."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def relabel(part: Split | Source, labels: np.ndarray) -> Split | Source:
    """Returns the images with label `labels[i]` in place of i.

    Args:
      part: some images.
      labels: int32 [classes].
    """
    if np.array_equal(labels, np.arange(len(labels))):
        return part
    if isinstance(part, Split):
        return replace(part, labels=labels[part.labels])
    return _Relabelled(part, labels)


@dataclass(frozen=True, eq=False)
class _Relabelled:
    source: Source
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.source)

    def name(self, index: int, /) -> str:
        return self.source.name(index)

    def __getitem__(self, index: int, /) -> "Encoded":
        encoded = self.source[index]
        return encoded._replace(label=int(self.labels[encoded.label]))
