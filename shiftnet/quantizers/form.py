"""The interface of weight forms, which compute a layer's weight from trained latents."""

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from shiftnet.quantizers.initializers import he_normal_fan_out
from shiftnet.quantizers.quantized import QuantizedWeight, bits_of, packed_bytes

LEAST = 1e-3  # magnitude of a latent that starts from a float weight, as a share of the largest

Init = Callable[..., jax.Array]  # init(key, shape)


class Weight(nnx.Module):
    """The weight of one convolution or linear layer.

    A subclass keeps each latent as an `nnx.Param` and is called without arguments for the weight,
    in the latents' dtype.

    Attributes:
      shape: `[k, k, in_features, out_features]` or `[in_features, out_features]`.
    """

    def __init__(self, shape: Sequence[int]):
        self.shape = tuple(shape)

    def __call__(self) -> jax.Array:
        raise NotImplementedError

    @property
    def bits(self) -> int:
        """Bits per weight in a packed file."""
        return 32

    @property
    def size(self) -> int:
        """Number of weights; there may be more latents."""
        return math.prod(self.shape)

    @property
    def packed_bytes(self) -> int:
        """Bytes of all weights in a packed file."""
        return packed_bytes(self.shape, self.bits)

    def regularizer(self) -> jax.Array | None:
        """Returns what this form adds to the loss, before its factor; None for nothing."""
        return None


class Form(Protocol):
    """Makes a weight: a subclass of `Weight`, its other arguments given."""

    def __call__(self, shape: Sequence[int], *, init: Init, rngs: nnx.Rngs) -> Weight: ...


class LowBitWeight(Weight):
    """A weight with few values, `levels[codes] * scale`.

    A form is `level`, `levels`, and `scale` where that is not 1. Its gradient is that of `level`
    times `scale` as JAX derives it (`straight_through` and the functions at the end of this file
    replace the slopes of steps), unless the form overrides `__call__`.

    Each weight draws one key from `rngs` whatever its form, so that the float layers of a low-bit
    network start as they do in the float network of the same seed.

    Args:
      shape: of the weight.
      latents: the names of its latents, float32 `shape` each.
      init: draws each latent.
      rngs: the `params` stream.

    Attributes:
      levels: the integers that a weight can be before it is scaled, rising.
      scale: what levels are multiplied by, as in `QuantizedWeight`. A form whose scale depends on
        its latents makes this a property and sets `scale_shape`; see `Rounded`.
      scale_shape: the shape of a scale that packed files must hold; None for a constant, which
        follows from the shape of the weight.
    """

    levels: tuple[int, ...]
    scale: jax.Array | float = 1.0
    scale_shape: tuple[int, ...] | None = None

    def __init__(
        self,
        shape: Sequence[int],
        latents: Sequence[str],
        *,
        init: Init = he_normal_fan_out,
        rngs: nnx.Rngs,
    ):
        super().__init__(shape)
        keys = jax.random.split(rngs.params(), len(latents))
        for name, key in zip(latents, keys, strict=True):
            setattr(self, name, nnx.Param(init(key, self.shape)))

    def level(self) -> jax.Array:
        """Returns the level of each weight, in the latents' dtype."""
        raise NotImplementedError

    def __call__(self) -> jax.Array:
        return self.level() * self.scale

    def quantized(self) -> QuantizedWeight:
        """Returns the same weight as codes, levels and scale."""
        level = self.level()
        levels = jnp.asarray(self.levels, level.dtype)
        codes = jnp.searchsorted(levels, level).astype(jnp.uint8)
        return QuantizedWeight(codes, self.scale, self.levels)

    def set_quantized(self, codes: np.ndarray, scale: np.ndarray | None = None) -> None:
        """Sets the latents so that the weights have these codes, and this scale.

        Each latent becomes plus or minus the standard deviation that it would have started with:
        where the latents of a weight are not known, this is enough to compute with it, and to train
        on from it.

        Args:
          codes: as in `QuantizedWeight`, of the weight's shape.
          scale: float32 `scale_shape`; None where that is None.
        """
        del scale  # of a form whose scale depends on its latents, which overrides this
        size = self.deviation
        signs = self.signs_of_latents(np.asarray(self.levels)[codes])
        for name, sign_of in signs.items():
            getattr(self, name).set_value(jnp.asarray(np.where(sign_of, size, -size)))

    def start_from(self, weight: np.ndarray) -> None:
        """Sets the latents so that this weight is nearest to a float weight, up to a factor.

        A latent is the farther from zero the farther the float weight is from where the latent
        changes its sign, so that training first changes the weights that were nearly at another
        level. Its root mean square is the deviation that it would have been drawn with.

        Args:
          weight: floating, of the weight's shape.
        """
        codes, factor = self.nearest(weight)
        levels = np.asarray(self.levels, np.float64)
        middles = (levels[1:] + levels[:-1]) / 2
        place = np.asarray(weight, np.float64) / (factor * self._unit)
        by_level = self.signs_of_latents(levels)
        for name, positive in self.signs_of_latents(levels[codes]).items():
            distance = np.abs(place[..., None] - middles[np.diff(by_level[name])]).min(-1)
            self._set_latent(name, positive, distance)

    def _set_latent(self, name: str, positive: np.ndarray, size: np.ndarray) -> None:
        """Sets a latent to these signs, and to magnitudes that are proportional to `size`."""
        size = np.maximum(size, LEAST * size.max()) if size.any() else np.ones(size.shape)
        size *= self.deviation / np.sqrt(np.square(size).mean())
        latent = np.where(positive, size, -size)
        getattr(self, name).set_value(jnp.asarray(latent, jnp.float32))

    @property
    def _unit(self) -> float:
        """What levels are multiplied by, where it does not depend on latents."""
        return 1.0 if self.scale_shape is not None else float(self.scale)

    def nearest(self, weight: np.ndarray) -> tuple[np.ndarray, float]:
        """Finds the codes whose weights are nearest to a float weight, up to a factor.

        Args:
          weight: floating, of the weight's shape.

        Returns:
          Codes for `set_quantized`, and the factor by which their weights (where the scale depends
          on latents: their levels) are multiplied to come nearest to `weight`, in the sum of
          squares. Of factors, 64 are tried, from that which takes the largest weight to the highest
          level to one that takes the mean a step beyond it.
        """
        flat = np.asarray(weight, np.float64).ravel() / self._unit
        levels = np.asarray(self.levels, np.float64)
        middles = (levels[1:] + levels[:-1]) / 2
        magnitude = np.abs(flat)
        if not magnitude.any():
            return np.searchsorted(middles, flat, "right").astype(np.uint8).reshape(self.shape), 1.0
        best = (np.inf, np.zeros(0), 1.0)
        for factor in np.geomspace(magnitude.max(), magnitude.mean() / 2, 64) / levels[-1]:
            codes = np.searchsorted(middles, flat / factor, "right")
            chosen = levels[codes]
            if not (power := chosen @ chosen):
                continue
            fitted = (flat @ chosen) / power
            error = np.square(flat - fitted * chosen).sum()
            if error < best[0]:
                best = (error, codes, fitted)
        _, codes, fitted = best
        for _ in range(20):  # until each weight is at its nearest level for the fitted factor
            nearest = np.searchsorted(middles, flat / fitted, "right")
            if (nearest == codes).all():
                break
            codes, chosen = nearest, levels[nearest]
            fitted = (flat @ chosen) / (chosen @ chosen)
        return codes.astype(np.uint8).reshape(self.shape), float(fitted)

    @property
    def deviation(self) -> np.float32:
        """Standard deviation of `he_normal_fan_out` for this shape."""
        return np.float32(math.sqrt(2 / (self.size / self.shape[-2])))

    def signs_of_latents(self, levels: np.ndarray) -> dict[str, np.ndarray]:
        """Returns, for weights at these levels, whether each latent is above zero, by its name."""
        raise NotImplementedError

    @property
    def bits(self) -> int:
        return bits_of(self.levels)

    @property
    def packed_bytes(self) -> int:
        scale_bytes = 0 if self.scale_shape is None else 4 * math.prod(self.scale_shape)
        return super().packed_bytes + scale_bytes


class Rounded(LowBitWeight):
    """A weight whose one latent, `unrounded`, is a float weight that a form rounds.

    The scale depends on the latent or is learned, and packed files hold it: one float32 number per
    layer. One per output channel would take 32 / inputs bits per weight, 2 for 16 inputs, for what
    the batch norm behind a layer does anyway.
    """

    scale_shape = ()
    unrounded: nnx.Param

    def __init__(self, shape: Sequence[int], *, init: Init = he_normal_fan_out, rngs: nnx.Rngs):
        super().__init__(shape, ["unrounded"], init=init, rngs=rngs)

    @property
    def edges(self) -> np.ndarray:
        """Between two levels, the number where rounding changes from one to the next."""
        levels = np.asarray(self.levels, np.float64)
        return (levels[1:] + levels[:-1]) / 2

    def start_from(self, weight: np.ndarray) -> None:
        self.unrounded.set_value(jnp.asarray(weight, jnp.float32))

    def settled(self, latent: np.ndarray, scale: float) -> np.ndarray:
        """Returns a latent like the given one that gives this scale; float64 `shape`."""
        del scale  # of a form that learns it
        return latent

    def set_quantized(self, codes: np.ndarray, scale: np.ndarray | None = None) -> None:
        """Sets the latent so that the weights have these codes, and this scale.

        The latent lies at the levels, or as far from them as the scale asks for, between the edges.
        Where codes and scale are those of some latent, the codes come back, and the scale up to
        rounding.
        """
        assert scale is not None
        unit = float(scale)
        edges = unit * np.concatenate([[-np.inf], self.edges, [np.inf]])
        low, high = edges[codes], edges[codes.astype(np.int64) + 1]
        gaps = np.diff(self.edges)
        # Of each code, as that of the narrowest is below a float32's resolution at a wide one.
        margin = 1e-3 * unit * np.concatenate([gaps[:1], gaps, gaps[-1:]])[codes]
        latent = unit * np.asarray(self.levels, np.float64)[codes]
        for _ in range(200):
            latent = self.settled(latent, unit)
            if ((low < latent) & (latent < high)).all():
                break
            latent = np.clip(latent, low + margin, high - margin)
        self.unrounded.set_value(jnp.asarray(latent, jnp.float32))


@jax.custom_jvp
def straight_through(value: jax.Array, through: jax.Array) -> jax.Array:
    """Returns `value`, with the gradient as if it were `through`."""
    del through
    return value


@straight_through.defjvp
def _straight_through_jvp(primals, tangents):
    return straight_through(*primals), tangents[1]


def sign(x: jax.Array) -> jax.Array:
    """Returns ±1, +1 at zero; the gradient is the identity."""
    return straight_through(jnp.where(x >= 0, 1, -1).astype(x.dtype), x)


def gate(x: jax.Array) -> jax.Array:
    """Returns 1 above zero, else 0; the gradient is the identity."""
    return straight_through((x > 0).astype(x.dtype), x)


def power_of_two(exponent: jax.Array) -> jax.Array:
    """Returns 2^exponent for whole exponents from 0 to 30, exactly; `jnp.exp2` can round."""
    power = jnp.left_shift(1, exponent.astype(jnp.int32)).astype(exponent.dtype)
    return straight_through(power, math.log(2) * jax.lax.stop_gradient(power) * exponent)
