"""The trained networks, by name.

A name is that of a row of the results (`results/table.toml`) that was trained on its full schedule;
with `_short` or `_distilled` behind it, that of one which was trained by the recipe of that name
(`results/short/`, `results/distilled/`).
Its file and its numbers are what `python -m shiftnet reproduce` left in `results/`, which is
`shiftnet/zoo/results` here and in an installed package. Files that are too large for the package
are fetched, see `shiftnet.zoo.storage`.

Wherever a checkpoint is named, a path that exists wins over a name.
"""

from shiftnet.zoo.index import Model, Models, get, list_models
from shiftnet.zoo.names import file_of, find, find_all, find_trainable, named

__all__ = [
    "Model",
    "Models",
    "file_of",
    "find",
    "find_all",
    "find_trainable",
    "get",
    "list_models",
    "named",
]
