# SPDX-License-Identifier: Apache-2.0
"""Losses, in float32, one value per image."""

import jax
import jax.numpy as jnp


def smooth_labels(labels: jax.Array, num_classes: int, smoothing: float) -> jax.Array:
    """(B,) int labels -> (B, num_classes) targets with `smoothing` spread over all classes."""
    return (1 - smoothing) * jax.nn.one_hot(labels, num_classes) + smoothing / num_classes


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Logits and target probabilities (B, num_classes) -> (B,) float32 nats."""
    return -jnp.sum(targets * jax.nn.log_softmax(logits.astype(jnp.float32)), axis=-1)
