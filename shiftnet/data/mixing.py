"""Augmentation of whole batches of normalised images, on the device: mixup, CutMix, erasing."""

import jax
import jax.numpy as jnp

# Attempts to place an erased rectangle; its share of the image and its aspect (arXiv:1708.04896,
# as torchvision's RandomErasing has them).
ERASING_ATTEMPTS, ERASING_AREA, ERASING_ASPECT = 10, (0.02, 0.33), (0.3, 3.3)


def mix(
    key: jax.Array, images: jax.Array, targets: jax.Array, *, mixup: float, cutmix: float
) -> tuple[jax.Array, jax.Array]:
    """Mixes every image and its target with the one before it in the batch.

    Mixup (Zhang et al., arXiv:1710.09412) averages the two; CutMix (Yun et al., arXiv:1905.04899)
    puts a rectangle of the other into the image. One share for the batch is drawn from
    Beta(alpha, alpha); where both are asked for, each batch takes one of them with equal chance.

    Args:
      key: random.
      images: floating `[N, H, W, C]`.
      targets: floating `[N, num_classes]`, each row summing to 1.
      mixup: alpha of mixup; 0: none.
      cutmix: alpha of CutMix; 0: none.

    Returns:
      Images and targets of the same shapes and dtypes.
    """
    if not mixup and not cutmix:
        return images, targets
    choice_key, share_key, place_key = jax.random.split(key, 3)
    take_cutmix = jax.random.bernoulli(choice_key, 0.5 if mixup and cutmix else float(cutmix > 0))
    alpha = jnp.where(take_cutmix, cutmix or mixup, mixup or cutmix)
    share = jax.random.beta(share_key, alpha, alpha, dtype=jnp.float32)
    inside, cut_share = _rectangle(place_key, images.shape[1:3], share)
    share = jnp.where(take_cutmix, cut_share, share)
    other = jnp.roll(images, 1, axis=0)
    own = share.astype(images.dtype)
    cut = jnp.where(inside[..., None], other, images)
    mixed = own * images + (1 - own) * other
    share = share.astype(targets.dtype)
    return (
        jnp.where(take_cutmix, cut, mixed),
        share * targets + (1 - share) * jnp.roll(targets, 1, axis=0),
    )


def _rectangle(
    key: jax.Array, size: tuple[int, ...], share: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Where CutMix shows the other image, bool `[H, W]`, and the share that is left of its own."""
    middle = jax.random.randint(key, (2,), 0, jnp.array(size))
    half = (0.5 * jnp.sqrt(1 - share) * jnp.array(size, jnp.float32)).astype(jnp.int32)
    sides = []
    for axis, length in enumerate(size):
        place = jnp.arange(length)
        sides.append((place >= middle[axis] - half[axis]) & (place < middle[axis] + half[axis]))
    inside = sides[0][:, None] & sides[1]
    return inside, 1 - inside.mean(dtype=jnp.float32)


def erase(key: jax.Array, images: jax.Array, probability: float) -> jax.Array:
    """Sets a rectangle of some images to 0, which is the mean colour of normalised ones.

    Zhong et al., "Random Erasing Data Augmentation", arXiv:1708.04896.

    Args:
      key: random.
      images: floating `[N, H, W, C]`, normalised.
      probability: of an image to be erased.

    Returns:
      Images of the same shape and dtype.
    """
    if not probability:
        return images
    count, height, width, _ = images.shape
    chance_key, area_key, aspect_key, place_key = jax.random.split(key, 4)
    shape = (count, ERASING_ATTEMPTS)
    area = jax.random.uniform(area_key, shape, jnp.float32, *ERASING_AREA) * (height * width)
    low, high = jnp.log(jnp.array(ERASING_ASPECT))
    aspect = jnp.exp(jax.random.uniform(aspect_key, shape, jnp.float32) * (high - low) + low)
    heights = jnp.round(jnp.sqrt(area * aspect)).astype(jnp.int32)
    widths = jnp.round(jnp.sqrt(area / aspect)).astype(jnp.int32)
    fits = (heights < height) & (widths < width)
    first = fits.argmax(1)[:, None]
    chosen = jax.random.bernoulli(chance_key, probability, (count,)) & fits.any(1)
    row_key, column_key = jax.random.split(place_key)

    def side(key: jax.Array, length: int, lengths: jax.Array) -> jax.Array:
        own = jnp.take_along_axis(lengths, first, 1)
        start = jax.random.randint(key, (count, 1), 0, jnp.maximum(length - own + 1, 1))
        place = jnp.arange(length)
        return (place >= start) & (place < start + own)

    rows, columns = side(row_key, height, heights), side(column_key, width, widths)
    inside = rows[:, :, None, None] & columns[:, None, :, None] & chosen[:, None, None, None]
    return jnp.where(inside, jnp.zeros((), images.dtype), images)
