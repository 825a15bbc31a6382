# SPDX-License-Identifier: Apache-2.0
"""One image at a time through a model and through the same model with fewer tokens."""

import functools
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageOps

from evit_jax.data.augment import center_crop, decode
from evit_jax.errors import InputError, check_name
from evit_jax.measure.agreement import image_figures
from evit_jax.measure.candidates import candidates, dense_twin
from evit_jax.measure.programs import compile_logits
from evit_jax.measure.reduction import check_params, default_method
from evit_jax.measure.timing import take_turns
from evit_jax.models import build_model, preprocessing
from evit_jax.plan.flops import macs
from evit_jax.reducers import create_reducer, known_reducers
from evit_jax.runtime.parallel import DataParallel
from evit_jax.training.trained import ModelSpec, reduces

TOP = 5  # classes of an outcome
MOST_PLANS = 16  # whose programs are kept; each takes hundreds of a process's memory mappings
ROUNDS, SECONDS = 7, 0.05  # of the timing: turns of each program, and how long one is
OFFERED = 0.7  # a method is offered if it can meet this share of the dense model's cost


class Outcome(NamedTuple):
    """What one of the two models makes of an image, and what it costs."""

    top: tuple[tuple[str, float], ...]  # most probable classes first; empty for pooled features
    tokens: tuple[int, ...]  # after each block, prefix included
    macs: int  # multiply-accumulates of one image
    milliseconds: float  # of one image alone, until its logits are there; median


class Look(NamedTuple):
    """An image, dense and reduced."""

    view: Image.Image  # as the models see it
    grid: tuple[int, int]  # rows and columns of patches
    prefix: int  # tokens in front of the patches
    blocks: tuple[int, ...]  # that reduce
    owners: tuple[np.ndarray, ...]  # per such block, (P,) int32: each patch's token, -1 if none
    dense: Outcome
    reduced: Outcome
    kl: float | None  # KL(dense || reduced), nats; None where there are no classes
    cosine: float | None  # similarity of the pooled features, where there are no classes


class Programs(NamedTuple):
    """Compiled for one plan; both take (params, normalized images (1, H, W, 3) float32)."""

    look: Callable  # -> (logits (1, C), owners)
    logits: Callable  # -> (1, C): the one that is timed


class SideBySide:
    """A model with its weights, and its programs for the plans that were asked for last."""

    def __init__(self, spec: ModelSpec, classes: Sequence[str] | None = None):
        """Loads the weights; nothing is compiled yet.

        Args:
          classes: the names of all of the model's classes, in order; None: numbers.

        Raises:
          InputError: weights that do not fit the model, or names for another number of classes.
        """
        self.spec, self.dense = spec, dense_twin(spec)
        if classes is not None and len(classes) != self.dense.num_classes:
            raise InputError(
                f"there are {len(classes)} names and {spec.label} has {self.dense.num_classes} "
                "classes"
            )
        self.classes = classes or [f"class {i}" for i in range(self.dense.num_classes)]
        self.card = preprocessing(spec.name)
        self.full = macs(self.dense)
        self.devices = DataParallel(jax.devices()[:1])
        own = build_model(**spec.settings)
        learned = spec.workdir is not None and isinstance(own.reducer, nn.Module) and reduces(own)
        self.reducers = ({spec.reducer: own.reducer} if learned else {}) | offered(spec, self.dense)
        if not self.reducers:
            raise InputError(
                f"no method without training can reduce {spec.label} to {OFFERED:.0%} of its "
                "multiply-accumulates; give a model with more patches or more blocks"
            )
        # A method that learned has parameters besides; the others do not look at them.
        params = spec.load_params(own if learned else self.dense)
        self.params = self.devices.init(dict, params)
        self.programs: OrderedDict[object, Programs] = OrderedDict()

    @property
    def methods(self) -> list[str]:
        """The reducers that work with these weights, the one to begin with first."""
        first = [self.spec.reducer] if self.spec.workdir else []
        best = [name for name in (*first, default_method(self.dense)) if name in self.reducers]
        return list(dict.fromkeys([*best, *self.reducers]))

    def plan(self, method: str, *, share: float | None = None, keep_rate: float | None = None):
        """The reduced model, a Linen module over the same parameters.

        Args:
          method: one of `methods`.
          share: of the dense model's multiply-accumulates, an upper bound; or
          keep_rate: what each reducing block of the method keeps of its patch tokens.

        Raises:
          InputError: an unknown method, or a plan that it cannot make or that reduces nothing.
        """
        base = self.dense.clone(reducer=self.reducers[check_name("method", method, self.methods)])
        layers = self.spec.layers if method == self.spec.reducer else None
        budget = None if share is None else share * self.full
        model = base.clone(keep=base.plan(macs=budget, keep_rate=keep_rate, layers=layers))
        if not reduces(model):
            raise InputError("this plan reduces nothing: move the slider to the left")
        if isinstance(model.reducer, nn.Module):
            check_params(model, self.params)
        return model

    def view(self, picture: bytes | np.ndarray, name: str = "the picture") -> Image.Image:
        """Encoded bytes or a uint8 array (H, W[, 3]) -> RGB, upright, as the model sees it.

        Raises:
          InputError: it cannot be read as an image.
        """
        image = decode(picture, name)
        if isinstance(picture, bytes):  # cameras leave it to the viewer to turn their pictures
            image = upright(image)
        return center_crop(image, size=self.dense.image_size, **self.card.view)

    def compiled(self, model) -> bool:
        """Whether `look` has the programs it needs, of this model and the dense one."""
        return {self.dense, model} <= self.programs.keys()

    def compile(self, model) -> None:
        """Makes the programs that `look` needs and does not have; those used least recently go."""
        for one in (model, self.dense):  # the dense one last: it never goes
            if one not in self.programs:
                self.programs[one] = self.compile_one(one)
            self.programs.move_to_end(one)
        while len(self.programs) > 1 + MOST_PLANS:
            self.programs.popitem(last=False)

    def compile_one(self, model) -> Programs:
        images = jax.ShapeDtypeStruct((1, *model.image_size, 3), jnp.float32)
        logits = compile_logits(model, self.params, images, self.devices)
        if model == self.dense:  # nothing but logits to look at
            return Programs(lambda *inputs: (logits(*inputs), []), logits)

        def look(params, images):
            logits, out = model.apply({"params": params}, images)
            return logits, out["owner"]

        compiled = self.devices.compile_eval(look).lower(self.params, images).compile()
        return Programs(compiled, logits)

    def look(self, view: Image.Image, model) -> Look:
        """Runs both models on an image from `view`, and times them in turns.

        Args:
          model: from `plan`; compiled first where it has to be.
        """
        self.compile(model)
        images = self.card.normalize(jnp.asarray(np.asarray(view)[None]))
        both = {"dense": self.dense, "reduced": model}
        timed = {
            name: functools.partial(self.programs[one].logits, self.params, images)
            for name, one in both.items()
        }
        seconds = take_turns(timed, rounds=ROUNDS, seconds=SECONDS)
        seen = {name: self.programs[one].look(self.params, images) for name, one in both.items()}
        outcomes = {
            name: Outcome(
                self.top(seen[name][0]),
                one.tokens_per_block,
                macs(one),
                1000 * float(np.median(seconds[name])),
            )
            for name, one in both.items()
        }
        return Look(
            view=view,
            grid=model.grid,
            prefix=model.prefix,
            blocks=tuple(block for block, keep in enumerate(model.keep) if keep is not None),
            owners=tuple(np.asarray(owner[0]) for owner in seen["reduced"][1]),
            **outcomes,
            **divergence(seen["dense"][0], seen["reduced"][0], classes=self.dense.num_classes),
        )

    def top(self, logits: jax.Array) -> tuple[tuple[str, float], ...]:
        """The most probable classes of logits (1, C), none of pooled features."""
        if not self.dense.num_classes:
            return ()
        probabilities = np.asarray(jax.nn.softmax(logits[0].astype(jnp.float32)))
        best = np.argsort(-probabilities, kind="stable")[:TOP]
        return tuple((self.classes[i], float(probabilities[i])) for i in best)


def offered(spec: ModelSpec, dense) -> dict[str, object]:
    """Name -> reducer of the methods that need no training and can meet a budget.

    Those that ask for a class token, where there is none, rank by the mean of all attention.
    """
    methods = [
        name
        if dense.class_token or not create_reducer(name).reads_class_token
        else f"{name}:by=mean"
        for name in known_reducers()
    ]
    budget = OFFERED * macs(dense)
    found, _ = candidates(spec, dense, methods=methods, budgets=[budget], plans=["own"])
    models = {one.method: one.model for one in found if one.model is not None}
    return {
        method: model.reducer
        for method, model in models.items()
        if not isinstance(model.reducer, nn.Module)
    }


def divergence(dense: jax.Array, reduced: jax.Array, *, classes: int) -> dict[str, float | None]:
    """`kl` and `cosine` of `Look`, of logits or, with no classes, pooled features (1, C)."""
    if classes:
        label = jnp.zeros(1, jnp.int32)  # nobody looks whether it was hit
        kl = float(image_figures(reduced, label, dense)["kl"][0])
        return dict(kl=max(kl, 0.0), cosine=None)  # rounding could leave it below
    a, b = (np.asarray(x[0], np.float64) for x in (dense, reduced))
    return dict(kl=None, cosine=float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b))))


def upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF data asks; as it is where they are damaged."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # whatever a damaged header makes of its parser
        return image
