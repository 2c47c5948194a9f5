"""Initialisers of parameters."""

import jax
import jax.numpy as jnp

# Uniform within ±1/sqrt(fan_in): what PyTorch gives its convolutions and linear layers, and thereby
# what the original networks trained from. A variance of 1/(3 fan_in) is that uniform distribution.
torch_uniform = jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform", dtype=jnp.float32)

# N(0, 2 / (k k out_features)): PyTorch's kaiming_normal_(mode="fan_out"), from which 1-bit wide
# ResNets, S3's latents and torchvision's ResNets start.
he_normal_fan_out = jax.nn.initializers.variance_scaling(
    2.0, "fan_out", "normal", dtype=jnp.float32
)


def torch_uniform_bias(key: jax.Array, features: int, fan_in: int) -> jax.Array:
    """Draws a bias as PyTorch does: float32 `[features]`, uniform within ±1/sqrt(fan_in)."""
    bound = fan_in**-0.5
    return jax.random.uniform(key, (features,), jnp.float32, -bound, bound)
