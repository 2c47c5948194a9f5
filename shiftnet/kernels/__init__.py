"""Operations that shift networks and low-bit networks are built from, one folder each.

Each has gradients of its own, which `jax.grad` and `jax.vjp` take, and these have gradients again.
`jax.jvp` and what is built on it (forward mode) find no rule, nor do third derivatives where a
kernel runs: `implementation="xla"` has them.

In a checkout this package is also the top-level folder `kernels/`.
"""
