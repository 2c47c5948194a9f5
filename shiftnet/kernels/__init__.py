"""Operations that shift networks and low-bit networks are built from, one folder each.

Each operation has its own gradient, used by `jax.grad` and `jax.vjp`, which can be differentiated
once more. Forward mode (`jax.jvp`) is not supported, nor are third derivatives where a kernel runs;
use `implementation="xla"` for those.

In a checkout the top-level folder `kernels/` is a symbolic link to this package; importing it
returns the same modules.
"""

if __name__ == "kernels":
    import importlib
    import pkgutil
    import sys

    import shiftnet.kernels

    for _module in pkgutil.walk_packages(shiftnet.kernels.__path__, "shiftnet.kernels."):
        if not _module.name.endswith(".__main__"):
            _alias = _module.name.removeprefix("shiftnet.")
            sys.modules[_alias] = importlib.import_module(_module.name)
    sys.modules[__name__] = shiftnet.kernels
