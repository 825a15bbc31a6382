# SPDX-License-Identifier: Apache-2.0
"""How close models with fewer tokens stay to their dense twin, image by image, in one pass.

All of them see the same images, so differences are paired: what an easy or a hard image does to the
dense model and to a reduced one cancels.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from evit_jax.models.card import Preprocessing
from evit_jax.runtime.parallel import Chunked, DataParallel
from evit_jax.training import losses, metrics
from evit_jax.training.evaluation import run_through

DENSE = "dense"
CLOSE = 0.01  # of a cost


class Figures(NamedTuple):
    """What a model does with n images; arrays have an entry for each."""

    top1: float  # fractions of the images
    top5: float
    hit: np.ndarray  # (n,) bool, whether its first class is the label
    same: np.ndarray  # (n,) bool, whether it is the dense model's first class
    kl: np.ndarray  # (n,) float64 nats, KL(dense || model) of the class probabilities


def image_figures(logits: jax.Array, labels: jax.Array, dense: jax.Array) -> dict[str, jax.Array]:
    """`hit`, `same` and `kl` of `Figures`, (B,) each, on the device.

    Args:
      logits, dense: (B, C), a model's and its dense twin's.
      labels: (B,) int32.
    """
    ours, theirs = (jax.nn.log_softmax(x.astype(jnp.float32)) for x in (logits, dense))
    first = jnp.argmax(logits, axis=-1)
    return dict(
        hit=first == labels,
        same=first == jnp.argmax(dense, axis=-1),
        # As a sum of differences: that of two large sums would lose a small divergence.
        kl=jnp.sum(jnp.exp(theirs) * (theirs - ours), axis=-1),
    )


def step(params: dict, batch: dict, *, model, preprocessing: Preprocessing) -> dict:
    """A batch's metric sums, logits (B, C) float32, and figures of each image.

    Args:
      batch: as for `steps.eval_step`, and `dense` (B, C), the logits of the dense model; without
        them the model is its own dense twin.
    """
    images = preprocessing.normalize(batch["image"])
    logits, _ = Chunked(model).apply({"params": params}, images)
    label, mask = batch["label"], batch["mask"]
    loss = losses.cross_entropy(logits, jax.nn.one_hot(label, logits.shape[-1]))
    figures = image_figures(logits, label, batch.get("dense", logits))
    return dict(
        sums=metrics.sums(logits, label, loss, mask),
        logits=logits,
        images=figures | dict(mask=mask),
    )


def beside_dense(
    batches: Iterator[dict],
    programs: dict[str, Callable[[dict], dict]],
    devices: DataParallel,
    *,
    see: Callable[[dict], object] = lambda host: None,
) -> tuple[dict[str, Figures], dict]:
    """Runs all models on every batch; the dense logits of a batch are computed once.

    Args:
      batches, devices, see: as for `evaluation.run_through`.
      programs: name -> (batch on the devices) -> result of `step`; `DENSE` is the first.

    Returns:
      (name -> its figures over all images that the masks leave in, the first batch with its dense
      logits, as the programs take it).
    """
    found = {name: [] for name in programs}
    first, dense = {}, {}

    def run(name: str, batch: dict) -> dict:
        result = programs[name](batch | dense if name != DENSE else batch)
        if name == DENSE:
            dense["dense"] = result["logits"]
            if not first:
                first.update(batch | dense)
        found[name].append(result["images"])
        return result["sums"]

    def program(name: str) -> Callable[[dict], dict]:
        return lambda batch: run(name, batch)

    scores = run_through(batches, {name: program(name) for name in programs}, devices, see=see)
    return {name: joined(found[name], scores[name]) for name in programs}, first


def joined(parts: list[dict[str, jax.Array]], scores: dict[str, float]) -> Figures:
    """The figures of all batches, without padding and damaged images."""
    parts = jax.device_get(parts)
    mask = np.concatenate([part["mask"] for part in parts])
    hit, same, kl = (
        np.concatenate([part[name] for part in parts])[mask] for name in ("hit", "same", "kl")
    )
    return Figures(scores["test_top1"], scores["test_top5"], hit, same, kl.astype(np.float64))


def standard_error(values: np.ndarray) -> float | None:
    """Of the mean of (n,) values; None for fewer than two."""
    return float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None


def summary(model: Figures, dense: Figures, *, labels: bool = True) -> dict:
    """A model's row: fractions, images won and lost, divergence in nats, standard errors.

    `top1_error` is that of the difference in top-1 to the dense model, on the same images. Without
    labels all that needs them is None.
    """
    change = model.hit.astype(np.int64) - dense.hit
    scores = dict(
        top1=model.top1,
        top5=model.top5,
        won=int(np.sum(change > 0)),
        lost=int(np.sum(change < 0)),
        top1_error=standard_error(change),
    )
    return (scores if labels else dict.fromkeys(scores)) | dict(
        agreement=float(np.mean(model.same)),
        agreement_error=standard_error(model.same),
        kl=float(np.mean(model.kl)),
        kl_error=standard_error(model.kl),
    )


def frontier(points: list[tuple[float, float]]) -> list[bool]:
    """Which (cost, loss) no other point beats: none loses less at as low a cost.

    Costs count as equal up to `CLOSE`: plans are of whole tokens and meet a budget no closer.
    """
    return [
        not any(cost <= (1 + CLOSE) * own[0] and loss < own[1] for cost, loss in points)
        for own in points
    ]
