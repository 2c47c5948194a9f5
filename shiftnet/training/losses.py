"""What a network is trained to make small."""

import jax
import optax


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
