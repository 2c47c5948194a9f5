"""Operations that shift networks and low-bit networks are built from, one folder each.

Each has gradients of its own, which `jax.grad` and `jax.vjp` take, and these have gradients again.
`jax.jvp` and what is built on it (forward mode) find no rule, nor do third derivatives where a
kernel runs: `implementation="xla"` has them.

In a checkout this package is also the top-level folder `kernels/`, a link to it; importing that
gives these very modules.
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
