"""TrivialAugment and RandAugment for uint8 images, on the device.

Müller and Hutter, "TrivialAugment", arXiv:2103.10158 (its wide space); Cubuk et al., "RandAugment",
arXiv:1909.13719; both with the operations and ranges of torchvision's implementation.

An image takes one operation of 14. Under `jax.vmap` a choice between functions computes all of
them, so each operation is written as parameters of four stages that every image goes through:

    affine map of positions -> table of 256 values a channel -> blend with grey -> blend with smooth

with parameters that leave an image as it is in the stages that its operation does not use.
"""

import jax
import jax.numpy as jnp
import numpy as np

OPERATIONS = (
    "identity",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
    "rotate",
    "brightness",
    "color",
    "contrast",
    "sharpness",
    "posterize",
    "solarize",
    "autocontrast",
    "equalize",
)
_INDEX = {name: index for index, name in enumerate(OPERATIONS)}
BINS = 31  # magnitudes there are, of both policies (torchvision)
# Operations whose magnitude is negative for every second image.
_SIGNED = np.array([1 <= index <= 9 for index in range(len(OPERATIONS))])


def trivial_augment(key: jax.Array, images: jax.Array) -> jax.Array:
    """One operation of random strength on every image.

    Args:
      key: random.
      images: uint8 `[N, H, W, 3]`.

    Returns:
      uint8 `[N, H, W, 3]`.
    """
    op_key, bin_key, sign_key = jax.random.split(key, 3)
    count = len(images)
    operation = jax.random.randint(op_key, (count,), 0, len(OPERATIONS))
    strength = jax.random.randint(bin_key, (count,), 0, BINS)
    return _augment(sign_key, images, operation, _wide_magnitudes()[operation, strength])


def rand_augment(
    key: jax.Array, images: jax.Array, *, operations: int = 2, magnitude: int = 9
) -> jax.Array:
    """Some operations of one strength, one after the other, on every image.

    Args:
      key: random.
      images: uint8 `[N, H, W, 3]`.
      operations: how many (torchvision: 2).
      magnitude: 0 to 30 (torchvision: 9).

    Returns:
      uint8 `[N, H, W, 3]`.
    """
    magnitudes = _magnitudes(images.shape[1:3])[:, magnitude]
    for number in range(operations):
        op_key, sign_key = jax.random.split(jax.random.fold_in(key, number))
        operation = jax.random.randint(op_key, (len(images),), 0, len(OPERATIONS))
        images = _augment(sign_key, images, operation, magnitudes[operation])
    return images


def _augment(key, images, operation, magnitude):
    negative = jax.random.bernoulli(key, 0.5, operation.shape) & jnp.asarray(_SIGNED)[operation]
    return apply(images, operation, jnp.where(negative, -magnitude, magnitude))


def _wide_magnitudes() -> jax.Array:
    """TrivialAugment's wide space: of each operation its `BINS` magnitudes, `[14, BINS]`."""
    return _table(0.99, (32.0, 32.0), 135.0, 0.99, 6)


def _magnitudes(size: tuple[int, ...]) -> jax.Array:
    """RandAugment's space; it translates by up to 150 / 331 of the image."""
    height, width = size
    return _table(0.3, (150 / 331 * width, 150 / 331 * height), 30.0, 0.9, 4)


def _table(shear, translations, degrees, strength, bits) -> jax.Array:
    rows = {
        "shear_x": np.linspace(0, shear, BINS),
        "shear_y": np.linspace(0, shear, BINS),
        "translate_x": np.linspace(0, translations[0], BINS).astype(int),
        "translate_y": np.linspace(0, translations[1], BINS).astype(int),
        "rotate": np.linspace(0, degrees, BINS),
        "posterize": 8 - np.round(np.arange(BINS) / ((BINS - 1) / bits)),
        "solarize": np.linspace(255, 0, BINS),
    }
    rows |= dict.fromkeys(
        ("brightness", "color", "contrast", "sharpness"), np.linspace(0, strength, BINS)
    )
    zeros = np.zeros(BINS)
    return jnp.asarray([rows.get(name, zeros) for name in OPERATIONS], jnp.float32)


def apply(images: jax.Array, operation: jax.Array, magnitude: jax.Array) -> jax.Array:
    """Applies one operation to every image, each its own, as Pillow computes it.

    Geometry takes the nearest pixel and fills with black; rotations are about the middle, shears
    about the upper left corner. Results differ from Pillow's by one level at most.

    Args:
      images: uint8 `[N, H, W, 3]`.
      operation: int32 `[N]`, indices of `OPERATIONS`.
      magnitude: float32 `[N]`: a shear, pixels, degrees; of brightness, color, contrast and
        sharpness what is added to a factor of 1; bits to keep; the level from which on levels are
        inverted.
    """
    return jax.vmap(_one)(images, operation, magnitude)


def _one(image: jax.Array, operation: jax.Array, magnitude: jax.Array) -> jax.Array:
    def is_(name: str) -> jax.Array:
        return operation == _INDEX[name]

    image = _warped(image, is_, magnitude)
    image = _looked_up(image, is_, magnitude)
    factor = 1 + magnitude
    image = _blend(_grey(image)[..., None], image, jnp.where(is_("color"), factor, 1.0))
    return _blend(_smooth(image), image, jnp.where(is_("sharpness"), factor, 1.0))


def _warped(image: jax.Array, is_, magnitude: jax.Array) -> jax.Array:
    """Geometry: output (x, y) shows input matrix @ (x, y) + offset."""
    height, width, _ = image.shape
    angle = jnp.where(is_("rotate"), magnitude * (np.pi / 180), 0.0)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    xy = jnp.where(is_("shear_x"), magnitude, sin)
    yx = jnp.where(is_("shear_y"), magnitude, -sin)
    dx = jnp.where(is_("translate_x"), magnitude, 0.0)
    dy = jnp.where(is_("translate_y"), magnitude, 0.0)
    # Rotations leave the middle where it is, shears the upper left corner.
    dx = jnp.where(is_("shear_x"), -magnitude * height / 2, dx)
    dy = jnp.where(is_("shear_y"), -magnitude * width / 2, dy)
    x = jnp.arange(width, dtype=jnp.float32)[None, :] + (0.5 - width / 2)
    y = jnp.arange(height, dtype=jnp.float32)[:, None] + (0.5 - height / 2)
    from_x = jnp.floor(cos * x + xy * y - dx + width / 2).astype(jnp.int32)
    from_y = jnp.floor(yx * x + cos * y - dy + height / 2).astype(jnp.int32)
    inside = (from_x >= 0) & (from_x < width) & (from_y >= 0) & (from_y < height)
    rows, columns = jnp.clip(from_y, 0, height - 1), jnp.clip(from_x, 0, width - 1)
    return jnp.where(inside[..., None], image[rows, columns], jnp.uint8(0))


def _looked_up(image: jax.Array, is_, magnitude: jax.Array) -> jax.Array:
    """What maps each channel's levels one by one, as a table `[3, 256]`."""
    levels = jnp.arange(256, dtype=jnp.int32)
    factor = 1 + magnitude
    brightness = _blended(0.0, levels.astype(jnp.float32), factor)
    mean = jnp.floor(_grey(image).astype(jnp.float32).mean() + 0.5)
    contrast = _blended(mean, levels.astype(jnp.float32), factor)
    dropped = (8 - jnp.clip(magnitude, 0, 8)).astype(jnp.int32)
    posterize = jnp.left_shift(jnp.right_shift(levels, dropped), dropped)
    solarize = jnp.where(levels.astype(jnp.float32) < magnitude, levels, 255 - levels)
    choices = (
        ("brightness", brightness),
        ("contrast", contrast),
        ("posterize", posterize),
        ("solarize", solarize),
    )
    table = levels
    for name, values in choices:
        table = jnp.where(is_(name), values.astype(jnp.int32), table)

    def of_channel(channel: jax.Array) -> jax.Array:
        own = jnp.where(is_("autocontrast"), _stretched(channel), table)
        own = jnp.where(is_("equalize"), _equalized(channel), own)
        return own.astype(jnp.uint8)[channel.astype(jnp.int32)]

    return jax.vmap(of_channel, in_axes=-1, out_axes=-1)(image)


def _stretched(channel: jax.Array) -> jax.Array:
    """The table that takes the lowest level to 0 and the highest to 255."""
    low, high = channel.min().astype(jnp.int32), channel.max().astype(jnp.int32)
    levels = jnp.arange(256, dtype=jnp.int32)
    stretched = jnp.clip((levels - low) * 255 // jnp.maximum(high - low, 1), 0, 255)
    return jnp.where(high > low, stretched, levels)


def _equalized(channel: jax.Array) -> jax.Array:
    """The table that makes all levels about as frequent."""
    levels = jnp.arange(256, dtype=jnp.int32)
    counts = jnp.zeros(256, jnp.int32).at[channel.astype(jnp.int32).ravel()].add(1)
    highest = channel.max().astype(jnp.int32)
    step = (channel.size - counts[highest]) // 255
    before = jnp.cumsum(counts) - counts
    equalized = jnp.clip((step // 2 + before) // jnp.maximum(step, 1), 0, 255)
    return jnp.where(step > 0, equalized, levels)


def _grey(image: jax.Array) -> jax.Array:
    """Luminance, uint8 `[H, W]`; Pillow's integers for ITU-R 601-2."""
    weights = jnp.array([19595, 38470, 7471], jnp.int32)
    total = (image.astype(jnp.int32) * weights).sum(-1) + 0x8000
    return jnp.right_shift(total, 16).astype(jnp.uint8)


def _smooth(image: jax.Array) -> jax.Array:
    """The mean of 3x3 pixels with weight 5 in the middle; the border is left as it is."""
    height, width, _ = image.shape
    wide = image.astype(jnp.int32)
    padded = jnp.pad(wide, ((1, 1), (1, 1), (0, 0)))
    total = 4 * wide + sum(
        padded[row : row + height, column : column + width]
        for row in range(3)
        for column in range(3)
    )
    rows, columns = np.arange(height), np.arange(width)
    inner = ((rows > 0) & (rows < height - 1))[:, None] & ((columns > 0) & (columns < width - 1))
    return jnp.where(inner[..., None], ((2 * total + 13) // 26).astype(jnp.uint8), image)


def _blend(degenerate: jax.Array, image: jax.Array, factor: jax.Array) -> jax.Array:
    blended = _blended(degenerate.astype(jnp.float32), image.astype(jnp.float32), factor)
    return blended.astype(jnp.uint8)


def _blended(degenerate, values, factor) -> jax.Array:
    """`degenerate + factor * (values - degenerate)`, cut to 0 to 255 and rounded down."""
    return jnp.clip(jnp.floor(degenerate + factor * (values - degenerate)), 0, 255)
