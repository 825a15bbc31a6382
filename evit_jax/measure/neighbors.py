# SPDX-License-Identifier: Apache-2.0
"""Nearest-neighbor classification: what features are worth without training a head.

The protocol of DINO (Caron et al., ICCV 2021, section 4.1) and DINOv2 (section 7.1), after Wu et
al. (CVPR 2018): the k labeled images that are most similar to a test image by the cosine of their
features vote for their classes with weight exp(cosine / temperature).

Letters: B images, n labeled images, D width of the features.
"""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from evit_jax.data.pipeline import split_host_arrays
from evit_jax.models.card import Preprocessing
from evit_jax.runtime.parallel import Chunked, DataParallel

SMALLEST = 1e-12  # of a length that is divided by


def unit(features: jax.Array) -> jax.Array:
    """(B, D) -> float32 of length 1."""
    features = features.astype(jnp.float32)
    length = jnp.linalg.norm(features, axis=-1, keepdims=True)
    return features / jnp.maximum(length, SMALLEST)


@dataclasses.dataclass(frozen=True)
class NearestNeighbors:
    """A model and labeled features that are applied as a classifier.

    `apply({"params": params}, images)` gives the logarithm of the classes' votes (B, classes), and
    takes the model's parameters, `bank` (n, D) float32 of length 1 and `labels` (n,) int32 as
    `params`.
    """

    model: object  # with num_classes=0: pooled features (B, D) take the place of logits
    classes: int
    neighbors: int = 20
    temperature: float = 0.07

    # What `parallel.chunk_size` reads.
    prefix = property(lambda self: self.model.prefix)
    patches = property(lambda self: self.model.patches)
    hidden = property(lambda self: self.model.hidden)

    def apply(self, variables: dict, images: jax.Array) -> tuple[jax.Array, dict]:
        """Images (B, H, W, 3) -> (log votes (B, classes), {})."""
        params = variables["params"]
        features = unit(self.model.apply({"params": params["model"]}, images)[0])
        similar = jnp.einsum("bd,nd->bn", features, params["bank"], precision="highest")
        best, at = jax.lax.top_k(similar, min(self.neighbors, similar.shape[1]))
        votes = jnp.exp((best - 1) / self.temperature)  # 1 at most, so that no vote overflows
        voted = params["labels"][at][..., None] == jnp.arange(self.classes)[None, None]
        total = jnp.sum(jnp.where(voted, votes[..., None], 0.0), axis=1)
        return jnp.log(total + SMALLEST), {}


def encode(
    models: list,
    params: dict,
    batches: Iterator[dict],
    devices: DataParallel,
    card: Preprocessing,
    *,
    see=lambda host: None,
) -> tuple[list[np.ndarray], np.ndarray]:
    """The features of all images by several models over the same parameters, in one pass.

    Args:
      models: with num_classes=0.
      params: on the devices.
      batches: of `pipeline.eval_batches`.
      card: how the models want their images.
      see: is handed what stays on the host of each batch, see `pipeline.split_host_arrays`.

    Returns:
      (n, D) float32 of length 1 for each model, and the labels (n,) int32; damaged images and
      padding are left out.
    """

    def programmed(model):
        def step(params, batch):
            images = card.normalize(batch["image"])
            features = unit(Chunked(model).apply({"params": params}, images)[0])
            return dict(features=features, label=batch["label"], mask=batch["mask"])

        return devices.compile_eval(step)

    programs = [programmed(model) for model in models]
    features, labels = [[] for _ in models], []
    for batch in batches:
        batch, host = split_host_arrays(batch)
        see(host)
        batch = devices.put(batch)
        answers = jax.device_get([program(params, batch) for program in programs])
        mask = answers[0]["mask"]
        labels.append(answers[0]["label"][mask])
        for kept, answer in zip(features, answers, strict=True):
            kept.append(answer["features"][mask])
    return [np.concatenate(kept) for kept in features], np.concatenate(labels)
