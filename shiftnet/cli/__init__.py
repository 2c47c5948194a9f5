"""The subcommands of `shiftnet`, one file each: they parse, call and print."""

import sys
from pathlib import Path

# Subcommand -> what it does. Each is the function `main` of the module of its name here.
COMMANDS = {
    "train": "train a network, or continue a run",
    "evaluate": "evaluate trained networks on a data set",
    "predict": "classify images",
    "models": "list the trained networks that can be named",
    "count": "count parameters, multiply-adds, bits and bytes",
    "convert": "convert a checkpoint of the original PyTorch codes",
    "pack": "write a network with its low-bit weights at their true width",
    "export": "write StableHLO, ONNX, a folder for the Hugging Face hub, or arrays",
    "reproduce": "train rows of the results table",
    "report": "draw runs and results as a page or as tables",
}
# Scripts that are a subcommand under another name: file -> how people call it.
SCRIPTS = {
    "train.py": "train.py",
    "evaluate.py": "evaluate.py",
    "convert_torch.py": "python -m shiftnet.convert_torch",
}


def prog(subcommand: str) -> str:
    """Returns what the running command is called: `"shiftnet train"`, or `"train.py"`."""
    return SCRIPTS.get(Path(sys.argv[0]).name, f"shiftnet {subcommand}")
