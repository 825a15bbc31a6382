# SPDX-License-Identifier: Apache-2.0
"""The teacher of a distillation: another model, the student's dense twin, or stored logits."""

import dataclasses
import math
from pathlib import Path

import jax
import numpy as np

from evit_jax.errors import InputError
from evit_jax.models import build_model, load_params, preprocessing
from evit_jax.models.card import Preprocessing
from evit_jax.reducers import as_spec, written
from evit_jax.training.losses import Distillation


@dataclasses.dataclass(frozen=True)
class Teacher:
    """What a run needs of it; without a teacher all fields are empty."""

    distillation: Distillation | None = None
    model: object = None  # a Linen module, None where the logits are stored
    preprocessing: Preprocessing | None = None
    params: dict = dataclasses.field(default_factory=dict)  # {"teacher": parameters}, or {}
    logits: np.ndarray | None = None  # (training images, classes), in the order of the data

    @property
    def recipe(self) -> dict:
        """Its share of a `steps.Recipe`."""
        return dict(
            distillation=self.distillation,
            teacher=self.model,
            teacher_preprocessing=self.preprocessing,
        )


def open_teacher(
    model,
    *,
    teacher: str,
    weights: str,
    hard: bool,
    alpha: float,
    temperature: float,
    tokens: float = 0.0,
) -> Teacher:
    """Finds the teacher for a student.

    Args:
      model: the student.
      teacher: "" for none, "self" for the student's own dense forward pass, a model's name, or a
        .npy file with logits (training images, classes) in the order of the data.
      weights: file of the named model, see `create_model`.
      hard, alpha, temperature, tokens: see `losses.Distillation`.

    Raises:
      InputError: an unknown teacher, one without weights, with other classes, or whose tokens
        cannot be compared with the student's.
    """
    named_model = teacher not in ("", "self") and not teacher.endswith(".npy")
    if weights and not named_model:
        raise InputError(
            "distill.weights are for a teacher that is named: "
            f"--config.distill.teacher=NAME, got {teacher!r}"
        )
    if tokens and (not teacher or teacher.endswith(".npy")):
        raise InputError(
            "distill.tokens compares tokens with a teacher's, so it needs a teacher that is a "
            f"model: --config.distill.teacher=self or a name, got {teacher!r}"
        )
    if model.reducer.recovers and not tokens:
        raise InputError(
            f"{written(as_spec(model.reducer))} recovers tokens to learn a teacher's, and nothing "
            "compares them: set --config.distill.tokens with a teacher, or leave recovery out"
        )
    if not teacher:
        return Teacher()
    if not 0 <= alpha <= 1 or not 0 < temperature < math.inf:
        raise InputError(
            "distill.alpha must be in [0, 1] and distill.temperature above 0, "
            f"got {alpha} and {temperature}"
        )
    distillation = Distillation(hard=hard, alpha=alpha, temperature=temperature, tokens=tokens)
    if teacher == "self":
        return Teacher(distillation, model.clone(keep=()))
    if teacher.endswith(".npy"):
        if not Path(teacher).is_file():
            raise InputError(f"distill.teacher: there is no file {teacher}")
        try:
            logits = np.load(teacher, mmap_mode="r")
        except ValueError as error:
            raise InputError(f"{teacher} is not a NumPy array: {error}") from None
        if logits.ndim != 2 or logits.shape[1] != model.num_classes:
            raise InputError(
                f"{teacher} must hold (training images, {model.num_classes} classes), "
                f"got {logits.shape}"
            )
        return Teacher(distillation, logits=logits)
    card = preprocessing(teacher)  # refuses an unknown name before anything else
    if not weights:
        raise InputError(f"the teacher {teacher} needs weights: --config.distill.weights=FILE")
    named = build_model(
        teacher,
        image_size=model.image_size,
        num_classes=model.num_classes,
        dtype=model.dtype,
    )
    ours, theirs = ((one.width, one.grid) for one in (model, named))
    if tokens and ours != theirs:
        raise InputError(
            f"distill.tokens needs a teacher with the student's width and grid, {ours}, and "
            f"{teacher} has {theirs}; set it to 0, or choose a teacher like the student"
        )
    if tokens and model.reducer.recovers and model.depth != named.depth:
        raise InputError(
            f"distill.tokens compares what {written(as_spec(model.reducer))} recovers after each "
            f"block with the teacher's tokens after the same one, so {teacher} must have "
            f"{model.depth} blocks like the student, and has {named.depth}; set it to 0 and leave "
            "recovery out, or choose a teacher like the student"
        )
    params = jax.device_get(load_params(weights, named, key=jax.random.key(0)))
    return Teacher(distillation, named, card, {"teacher": params})
