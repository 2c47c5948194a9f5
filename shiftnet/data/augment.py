"""From uint8 images to a training batch, on the device.

Everything here is a pure function of its arguments, made to be called inside a jitted step. All
randomness comes from the seed of the run with the number of the epoch or the step, so a resumed
run draws what an uninterrupted one would have, and from JAX's counter-based generator, whose
numbers do not depend on how an array is spread over devices.
"""

import jax
import jax.numpy as jnp

from shiftnet import errors

PAD_MODES = {"zero": "constant", "reflect": "reflect"}  # ours -> jnp.pad's

# Streams of one seed, so that epoch 3 and step 3 do not share their random numbers.
_ORDER, _AUGMENT, _CUTOUT, _POLICY, _ERASING, _MIXING, _TURNS, _PATHS = range(8)


def epoch_order(seed: int | jax.Array, epoch: int | jax.Array, num_examples: int) -> jax.Array:
    """Returns the order in which an epoch visits the examples.

    Args:
      seed: of the run.
      epoch: counted from 0.
      num_examples: N, static.

    Returns:
      int32 [N], a permutation of 0 to N - 1.
    """
    return jax.random.permutation(_key(seed, _ORDER, epoch), num_examples).astype(jnp.int32)


def augment_key(seed: int | jax.Array, step: int | jax.Array) -> jax.Array:
    """Returns the random key of a step's augmentation; `step` counts from 0 over the whole run."""
    return _key(seed, _AUGMENT, step)


def cutout_key(seed: int | jax.Array, step: int | jax.Array) -> jax.Array:
    """Returns the random key of a step's cutout; `step` counts from 0 over the whole run."""
    return _key(seed, _CUTOUT, step)


def policy_key(seed: int | jax.Array, step: int | jax.Array) -> jax.Array:
    """The random key of a step's TrivialAugment or RandAugment."""
    return _key(seed, _POLICY, step)


def erasing_key(seed: int | jax.Array, step: int | jax.Array) -> jax.Array:
    """The random key of a step's random erasing."""
    return _key(seed, _ERASING, step)


def mixing_key(seed: int | jax.Array, step: int | jax.Array) -> jax.Array:
    """The random key of a step's mixup and CutMix."""
    return _key(seed, _MIXING, step)


def path_keys(seed: int | jax.Array, step: int | jax.Array, count: int) -> jax.Array:
    """The random keys of a step's images, `[count]`, for the paths that are dropped."""
    return jax.random.split(_key(seed, _PATHS, step), count)


def _key(seed: int | jax.Array, stream: int, number: int | jax.Array) -> jax.Array:
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), stream), number)


def crop_flip(
    key: jax.Array, images: jax.Array, *, pad: int, pad_mode: str, flip: bool
) -> jax.Array:
    """Pads every image, crops it back to its size at a random place, and mirrors half of them.

    Every image has its own place, uniform over the (2 * pad + 1)^2 there are, and its own flip.

    Args:
      key: for example `augment_key(seed, step)`.
      images: uint8 [N, H, W, C] (any dtype will do).
      pad: pixels added on each side; 0 leaves the place as it is.
      pad_mode: `"zero"` pads with black pixels, as the shift networks' recipe does before it
        normalises; `"reflect"` mirrors the image without repeating its edge, as `np.pad` does.
      flip: whether images are mirrored left to right, each with probability 1/2.

    Returns:
      images of the same shape and dtype.

    Raises:
      UserError: for an unknown `pad_mode`.
    """
    offsets, flips = draw(key, len(images), pad=pad, flip=flip)
    return crop_flip_at(images, offsets, flips, pad=pad, pad_mode=pad_mode)


def draw(key: jax.Array, num_images: int, *, pad: int, flip: bool) -> tuple[jax.Array, jax.Array]:
    """Draws the random choices of `crop_flip`.

    Returns:
      offsets: int32 [N, 2], the row and column of each crop in the padded image, 0 to 2 * pad.
      flips: bool [N], which images are mirrored; all False without `flip`.
    """
    offset_key, flip_key = jax.random.split(key)
    offsets = jax.random.randint(offset_key, (num_images, 2), 0, 2 * pad + 1, jnp.int32)
    if not flip:
        return offsets, jnp.zeros(num_images, bool)
    return offsets, jax.random.bernoulli(flip_key, 0.5, (num_images,))


def crop_flip_at(
    images: jax.Array, offsets: jax.Array, flips: jax.Array, *, pad: int, pad_mode: str
) -> jax.Array:
    """`crop_flip` with the choices given, as `draw` returns them."""
    if pad_mode not in PAD_MODES:
        raise errors.unknown("data.pad_mode", pad_mode, PAD_MODES)
    padded = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)), PAD_MODES[pad_mode])

    def crop(image: jax.Array, offset: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(image, (*offset, jnp.zeros_like(offset[0])), images.shape[1:])

    cropped = jax.vmap(crop)(padded, offsets)
    return jnp.where(flips[:, None, None, None], cropped[:, :, ::-1], cropped)


def flip_in_turns(
    seed: int | jax.Array, epoch: int | jax.Array, indices: jax.Array, images: jax.Array
) -> jax.Array:
    """Mirrors each image in every second epoch, those of one half first and then the others.

    Jordan, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU", arXiv:2404.00498.

    Args:
      seed: of the run, from which follows who is in which half.
      epoch: counted from 0.
      indices: int32 [N], of the images in the training set.
      images: uint8 [N, H, W, C].

    Returns:
      images of the same shape and dtype.
    """
    key = _key(seed, _TURNS, 0)
    first = jax.vmap(lambda index: jax.random.bernoulli(jax.random.fold_in(key, index)))(indices)
    flips = first ^ (epoch % 2 == 1)
    return jnp.where(flips[:, None, None, None], images[:, :, ::-1], images)


def cutout(key: jax.Array, images: jax.Array, size: int) -> jax.Array:
    """Puts a square of random pixels over every image.

    DeVries and Taylor, arXiv:1708.04552, in the form of the code published with arXiv:1802.08530:
    the square lies anywhere that covers at least one pixel of the image, each place as likely, and
    every value in it is drawn uniformly from 0 to 255.

    Args:
      key: for example `cutout_key(seed, step)`.
      images: uint8 [N, H, W, C].
      size: side of the square in pixels; 0 leaves the images as they are.

    Returns:
      images of the same shape and dtype.
    """
    if not size:
        return images
    place_key, pixel_key = jax.random.split(key)
    count, height, width, _ = images.shape
    low, high = 1 - size, jnp.array([height, width], jnp.int32)
    corners = jax.random.randint(place_key, (count, 2), low, high, jnp.int32)
    rows, columns = (
        (jnp.arange(length, dtype=jnp.int32) >= corner) & (jnp.arange(length) < corner + size)
        for length, corner in ((height, corners[:, :1]), (width, corners[:, 1:]))
    )
    inside = rows[:, :, None, None] & columns[:, None, :, None]
    return jnp.where(inside, jax.random.bits(pixel_key, images.shape, jnp.uint8), images)


def normalize(
    images: jax.Array,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> jax.Array:
    """Computes `(images / 255 - mean) / std`, channel by channel.

    Args:
      images: uint8 [N, H, W, 3].
      mean, std: of each channel, for pixels in [0, 1].
      dtype: of the result. The arithmetic is in float32, or in float64 when that is asked for.

    Returns:
      `dtype` [N, H, W, 3].
    """
    wide = jnp.float64 if jnp.dtype(dtype) == jnp.float64 else jnp.float32
    centre, scale = (jnp.asarray(v, wide).reshape(1, 1, 1, 3) for v in (mean, std))
    return ((images.astype(wide) / 255 - centre) / scale).astype(dtype)
