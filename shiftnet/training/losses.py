"""What a network is trained to make small."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from shiftnet.config import Config

# Added to the deviation of logits (the code published with arXiv:2403.01427).
TINY = 1e-7


def loss_of_recipe(
    config: Config,
    logits: jax.Array,
    labels: jax.Array,
    targets: jax.Array | None = None,
    guidance: jax.Array | None = None,
    weights: np.ndarray | None = None,
) -> jax.Array:
    """The mean loss of a batch: that of the labels, and that of a teacher where there is one.

    Args:
      config: with the shares of the two in `distill.weight`.
      logits, labels, targets, weights: as of `cross_entropy`.
      guidance: the teacher's logits.

    Returns:
      floating [].
    """
    smoothing = config.loss.label_smoothing
    loss = cross_entropy(logits, labels, targets, smoothing=smoothing, weights=weights)
    if guidance is None:
        return loss
    distill = config.distill
    divergence = distillation(
        logits, guidance, temperature=distill.temperature, standardize=distill.standardize
    )
    return (1 - distill.weight) * loss + distill.weight * divergence


def cross_entropy(
    logits: jax.Array,
    labels: jax.Array,
    targets: jax.Array | None = None,
    *,
    smoothing: float = 0.0,
    weights: np.ndarray | None = None,
) -> jax.Array:
    """The mean cross entropy of a batch.

    Args:
      logits: floating `[N, num_classes]`.
      labels: int32 `[N]`.
      targets: floating `[N, num_classes]`, in place of the labels, each row summing to 1.
      smoothing: share of every target that is spread evenly over all classes (Szegedy et al.,
        arXiv:1512.00567, as PyTorch has it).
      weights: floating `[num_classes]`, what an image of each class counts in the mean, a mixed one
        by its shares; None: all the same. Without smoothing as PyTorch's `weight`.

    Returns:
      floating [].
    """
    counts = None
    if weights is not None:
        of_class = jnp.asarray(weights, logits.dtype)
        counts = of_class[labels] if targets is None else targets @ of_class
    if targets is None and not smoothing:
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    else:
        if targets is None:
            targets = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
        losses = optax.softmax_cross_entropy(logits, optax.smooth_labels(targets, smoothing))
    if counts is None:
        return losses.mean()
    return (losses * counts).sum() / counts.sum()


def balanced_weights(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Returns what an image of each class counts so that all classes count the same.

    Args:
      labels: int32 `[N]`, of the training images.
      num_classes: C.

    Returns:
      float32 `[num_classes]`, N / (C n) for a class of n images; 0 for one without.
    """
    images = np.bincount(labels, minlength=num_classes)
    even = len(labels) / num_classes
    return np.divide(even, images, out=np.zeros(num_classes, np.float32), where=images > 0)


def distillation(
    logits: jax.Array, teacher: jax.Array, *, temperature: float, standardize: bool
) -> jax.Array:
    """How far a network's softened predictions are from its teacher's.

    The mean over the batch of KL(softmax(teacher / T) || softmax(logits / T)), times T² (Hinton et
    al., arXiv:1503.02531). Standardised, each row of logits is first shifted to mean 0 and scaled
    to standard deviation 1, so that the network need not copy the teacher's range (Sun et al.,
    "Logit Standardization in Knowledge Distillation", CVPR 2024, arXiv:2403.01427).

    Args:
      logits: floating `[N, num_classes]`.
      teacher: the teacher's logits, likewise; no gradient goes through them.
      temperature: T, above 0.
      standardize: whether to standardise both.

    Returns:
      floating [].
    """
    teacher = jax.lax.stop_gradient(teacher)
    if standardize:
        logits, teacher = _standardized(logits), _standardized(teacher)
    ours = jax.nn.log_softmax(logits / temperature)
    theirs = jax.nn.log_softmax(teacher / temperature)
    return optax.losses.kl_divergence_with_log_targets(ours, theirs).mean() * temperature**2


def _standardized(logits: jax.Array) -> jax.Array:
    variance = logits.var(-1, keepdims=True, ddof=1)  # unbiased, as PyTorch's
    # The root of 0 has no gradient; a row that is constant is divided by 1.
    deviation = jnp.sqrt(jnp.where(variance > 0, variance, 1))
    return (logits - logits.mean(-1, keepdims=True)) / (deviation + jnp.asarray(TINY, logits.dtype))
