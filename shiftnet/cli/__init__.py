"""The subcommands of `shiftnet`, one file each: they parse, call and print."""

# Subcommand -> module of this package, and what it does.
COMMANDS = {
    "train": ("train", "train a network, or continue a run"),
    "evaluate": ("evaluate", "evaluate trained networks on a data set"),
    "count": ("count", "count parameters, multiply-adds, bits and bytes"),
    "convert": ("convert", "convert a checkpoint of the original PyTorch codes"),
    "pack": ("pack", "write a network with its low-bit weights at their true width"),
    "export": ("export", "write StableHLO, ONNX, or arrays under the original's names"),
    "reproduce": ("reproduce", "train rows of the results table"),
    "report": ("report", "draw runs and results as a page or as tables"),
}
