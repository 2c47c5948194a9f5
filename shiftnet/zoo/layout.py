"""Writes a network in the layout of the Hugging Face hub.

Such a folder has `model.safetensors`, the packed file, which alone is read again; `config.json`,
the same facts for people and for the hub's pages; and `README.md`, the card, with its metadata in
front.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from shiftnet import packing, tensor_file
from shiftnet.errors import UserError
from shiftnet.files import path_of, write_atomically
from shiftnet.inference import Classifier
from shiftnet.zoo import cards
from shiftnet.zoo.index import Model

CONFIG, CARD = "config.json", "README.md"


def write(folder: str | os.PathLike[str], model: Classifier, info: Model | None) -> Path:
    """Writes a network in the hub's layout.

    Args:
      folder: to make; it may exist if it has nothing but hidden files, as a new clone.
      model: with its numbers. A packed file is copied as it is; others are packed in float32.
      info: what is known of it as a trained network of this project; None for others.

    Returns:
      The folder, as an absolute path without `..`.

    Raises:
      UserError: if the folder has files, or cannot be written.
    """
    folder = path_of(folder, "--hub").resolve()  # making `new/..` would make `new`
    if folder.exists() and (
        not folder.is_dir() or any(not entry.name.startswith(".") for entry in folder.iterdir())
    ):
        raise UserError(f"{folder} is not empty; take another folder")
    name = info.name if info else folder.name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if tensor_file.kind_of(model.path) == packing.FORMAT:
            shutil.copyfile(model.path, folder / tensor_file.HUB_NAME)
        else:
            packing.write(folder / tensor_file.HUB_NAME, model.network, model.metadata)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}") from error
    size = (folder / tensor_file.HUB_NAME).stat().st_size
    text = json.dumps(_config(model), indent=2)
    write_atomically(folder / CONFIG, text + "\n")
    card = cards.front_matter(name, model, info) + cards.card(name, model, size, info)
    write_atomically(folder / CARD, card)
    return folder


def _config(model: Classifier) -> dict[str, Any]:
    recipe = model.config
    return {
        "library_name": "shiftnet",
        "model_type": recipe.model.arch,
        "format": packing.FORMAT,
        "id2label": {str(label): name for label, name in enumerate(model.class_names)},
        "image_size": model.preprocess.size,
        "image_resize": model.preprocess.resize,
        "image_mean": list(model.mean),
        "image_std": list(model.std),
        "recipe": recipe.to_dict(),
    }
