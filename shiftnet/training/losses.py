"""What a network is trained to make small."""

import jax
import jax.numpy as jnp
import optax

from shiftnet.config import Config

# Keeps the standardised logits of a constant row finite (the code published with arXiv:2403.01427).
TINY = 1e-7


def loss_of_recipe(
    config: Config,
    logits: jax.Array,
    labels: jax.Array,
    targets: jax.Array | None = None,
    guidance: jax.Array | None = None,
) -> jax.Array:
    """The mean loss of a batch: that of the labels, and that of a teacher where there is one.

    Args:
      config: with the shares of the two in `distill.weight`.
      logits, labels, targets: as of `cross_entropy`.
      guidance: the teacher's logits.

    Returns:
      floating [].
    """
    loss = cross_entropy(logits, labels, targets, smoothing=config.loss.label_smoothing)
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
) -> jax.Array:
    """The mean cross entropy of a batch.

    Args:
      logits: floating `[N, num_classes]`.
      labels: int32 `[N]`.
      targets: floating `[N, num_classes]`, in place of the labels, each row summing to 1.
      smoothing: share of every target that is spread evenly over all classes (Szegedy et al.,
        arXiv:1512.00567, as PyTorch has it).

    Returns:
      floating [].
    """
    if targets is None and not smoothing:
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    if targets is None:
        targets = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    return optax.softmax_cross_entropy(logits, optax.smooth_labels(targets, smoothing)).mean()


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
    deviation = logits.std(-1, keepdims=True, ddof=1)  # unbiased, as PyTorch's
    return (logits - logits.mean(-1, keepdims=True)) / (deviation + jnp.asarray(TINY, logits.dtype))
