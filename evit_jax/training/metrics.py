# SPDX-License-Identifier: Apache-2.0
"""Metrics as sums over images, divided once on the host: exact for any batch and device count."""

import jax
import jax.numpy as jnp

NAMES = ("loss", "top1", "top5")


def zeros() -> dict[str, jax.Array]:
    """Sums over no image yet."""
    return {name: jnp.zeros((), jnp.float32) for name in ("images", *NAMES)}


def sums(
    logits: jax.Array, labels: jax.Array, loss: jax.Array, mask: jax.Array | None = None
) -> dict[str, jax.Array]:
    """Sums of loss (B,), top-1 and top-5 hits of logits (B, classes) over the images in `mask`.

    Top-5 of a model with fewer than five classes counts all of its classes.
    """
    mask = jnp.ones(labels.shape, jnp.float32) if mask is None else mask.astype(jnp.float32)
    _, best = jax.lax.top_k(logits, min(5, logits.shape[-1]))
    hits = best == labels[:, None]
    return {
        "images": jnp.sum(mask),
        "loss": jnp.sum(mask * loss),
        "top1": jnp.sum(mask * hits[:, 0]),
        "top5": jnp.sum(mask * jnp.any(hits, axis=1)),
    }


def means(totals: list[dict[str, jax.Array]], prefix: str) -> dict[str, float]:
    """Sums of several batches -> means over all their images, named "test_top1" and so on."""
    totals = jax.device_get(totals)
    images = sum(float(batch["images"]) for batch in totals)
    return {
        f"{prefix}_{name}": sum(float(batch[name]) for batch in totals) / images for name in NAMES
    }
