# SPDX-License-Identifier: Apache-2.0
"""What training left in a workdir, as a model; and the model that a tool's flags ask for."""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import NamedTuple

import flax.linen as nn
import jax

from evit_jax.cli import MODEL_FLAGS
from evit_jax.data import open_source
from evit_jax.errors import InputError
from evit_jax.models import build_model, init_params, load_params
from evit_jax.models.folder import is_folder
from evit_jax.plan.counts import PLAN_FIELDS
from evit_jax.plan.files import read_plan
from evit_jax.reducers import written
from evit_jax.spec import numbers, parse_fields, parse_size
from evit_jax.storage import as_path, explained
from evit_jax.weights.names import (
    leaves,
    of_reducer,
    params_from_tensors,
    tensors_from_params,
    timm_name,
)

# Settings of `build_model` that are no sizes: tools have flags for them.
FLAGGED = {"name", "keep", "reducer", "dtype", "plan", *PLAN_FIELDS}
COUNTS = ("keep_rates", "tokens", "macs")  # what a single keep rate takes the place of


class Run(NamedTuple):
    """What training left in a workdir."""

    config: dict  # every field of configs/common.py that there was, as nested dicts
    model: object  # Linen module, with the run's own plan and reducer
    params: dict  # nested dict of float32 arrays: the average of the weights where there is one


def load_run(workdir: str | Path) -> Run:
    """The model that a run trained, with the weights of its newest checkpoint.

    Raises:
      InputError: the folder is not a run's, or has no checkpoint yet.
    """
    config = read_config(workdir)
    return Run(config, build_model(**config["model"]), load_checkpoint(workdir))


def read_config(workdir: str | Path) -> dict:
    """The configuration that train.py left in a workdir, as nested dicts.

    Raises:
      InputError: there is none.
    """
    folder = as_path(workdir)
    path = folder / "config.json"
    with explained(folder):
        if not path.exists():
            why = "it has no config.json" if folder.is_dir() else "there is no such folder"
            raise InputError(f"{workdir} is no training run: {why}; give train.py's --workdir")
        content = path.read_text()
    try:
        config = json.loads(content)
        return config | dict(model=dict(config["model"]))
    except (ValueError, TypeError, KeyError):
        raise InputError(f"{path} is damaged: it is not what train.py writes") from None


def has_checkpoint(workdir: str | Path) -> bool:
    """Whether a save of this run was ever completed."""
    folder = as_path(workdir) / "checkpoints"
    with explained(folder):
        return folder.is_dir() and any(saved.name.isdigit() for saved in folder.iterdir())


def load_checkpoint(workdir: str | Path) -> dict:
    """The weights of a run's newest checkpoint; the average of them where there is one.

    Raises:
      InputError: there is no checkpoint yet.
    """
    if not has_checkpoint(workdir):
        raise InputError(
            f"{workdir} has no complete checkpoint yet; train.py saves one every "
            "config.run.checkpoint_every epochs and at the end"
        )
    from evit_jax.training.checkpoint import Checkpoints  # Orbax takes long to import

    state = Checkpoints(as_path(workdir) / "checkpoints", read_only=True).load()
    return state.get("ema", state["params"])


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """A model as a tool's flags describe it: a name, sizes, or a training run."""

    label: str  # --model as it was written, or the workdir
    settings: dict  # of `build_model`, `name` among them; a run's with its own plan and reducer
    weights: str | None = None  # as for `create_model`
    workdir: str | None = None
    config: dict | None = None  # the run's

    @property
    def name(self) -> str:
        """The model's name, which its preprocessing goes by."""
        return self.settings["name"]

    @property
    def reducer(self) -> str:
        """Its name and settings, as a user writes them."""
        return written(self.settings.get("reducer") or "evit")

    @property
    def counted(self) -> bool:
        """Whether a rate for each block, counts or a budget are set, and not one keep rate."""
        return any(self.settings.get(name) for name in COUNTS)

    @property
    def keep_rate(self) -> float | None:
        """The rate that `build` uses unless told another; None where none is set."""
        return None if self.counted else self.settings.get("keep_rate")

    @property
    def layers(self) -> tuple[int, ...] | None:
        """The reducing blocks that are set; None: the reducer's own."""
        return self.settings.get("layers")

    @property
    def multiple_of(self) -> int:
        """What the tokens after each reducing block are rounded up to multiples of."""
        return self.settings.get("multiple_of", 1)

    def with_reducer(self, reducer: str) -> "ModelSpec":
        """The same with another reducer, whose own schedule, if any, replaces rates and counts."""
        if reducer == self.reducer:  # as it is written; there may be more to it, of a plan file
            return self
        sizes = {name: value for name, value in self.settings.items() if name not in PLAN_FIELDS}
        settings = self.settings | dict(reducer=reducer)
        if reduces(build_model(**sizes | dict(reducer=reducer))):
            settings = sizes | dict(reducer=reducer, multiple_of=self.multiple_of)
        return dataclasses.replace(self, settings=settings)

    def build(
        self,
        *,
        keep_rate: float | None = None,
        macs: float | None = None,
        multiple_of: int | None = None,
    ):
        """The Linen module with its plan.

        Args:
          keep_rate: instead of what is set; 1 is the dense model.
          macs: a budget, instead of what is set.
          multiple_of: instead of what is set.
        """
        settings = dict(self.settings)
        if keep_rate is not None:
            settings |= dict.fromkeys(COUNTS) | dict(keep_rate=keep_rate)
        if macs is not None:
            settings |= dict.fromkeys(COUNTS) | dict(keep_rate=None, macs=macs)
        if multiple_of is not None:
            settings["multiple_of"] = multiple_of
        return build_model(**settings)

    def load_params(self, model) -> dict:
        """The weights of the run or the file, for any model that `build` makes.

        Position embeddings are resized to the model's image size. Parameters of the reducer that
        the run was trained with are left out where the model has another, and in blocks that do
        not reduce.

        Raises:
          InputError: the run has no checkpoint yet, or the file does not fit.
        """
        key = jax.random.key(0)
        if self.workdir is None:
            return load_params(self.weights, model, key=key)
        params, trained = load_checkpoint(self.workdir), build_model(**self.config["model"])
        tensors = tensors_from_params(params, trained)
        if isinstance(model.reducer, nn.Module):  # the run may have no parameters for it
            fresh = init_params(model, key)
        else:  # only shapes are looked at
            fresh = jax.eval_shape(lambda key: init_params(model, key), key)
        known = set()
        if type(trained.reducer) is type(model.reducer):
            known = {timm_name(path) for path in leaves(fresh)}
        tensors = {
            name: array
            for name, array in tensors.items()
            if name in known or not of_reducer(name.split("."))
        }
        return params_from_tensors(tensors, model, fresh)

    def run_params(self, model) -> dict | None:
        """The weights of the run if it has a checkpoint, for tools that can do without."""
        if self.workdir is None or not has_checkpoint(self.workdir):
            return None
        return self.load_params(model)


def open_test_data(config: dict, *, classes: str | None = None):
    """The images that a run with this configuration is tested on.

    Args:
      classes: a file to take the place of config.data.classes.
    """
    data = config["data"]
    return open_source(data["name"], "test", data["dir"], classes=classes or data["classes"])


def reduces(model) -> bool:
    """Whether any block of the model reduces its tokens."""
    return any(count is not None for count in model.keep)


def open_spec(flags: argparse.Namespace, *, several: bool = False) -> ModelSpec:
    """The model that a tool's flags ask for, from those of `cli.MODEL_FLAGS` that it has.

    Args:
      several: the tool takes several --multiple_of, and sees to them itself.

    Raises:
      InputError: no model, no weights for a tool that takes them, flags that exclude each other, or
        a workdir that is not a run's.
    """
    given = {name: getattr(flags, name, None) for name in MODEL_FLAGS}
    given = {name: value for name, value in given.items() if value not in (None, "")}
    if "workdir" in given:
        for name in ("model", "weights", "num_classes"):
            if name in given:
                raise InputError(f"--workdir says which model it is; leave out --{name}")
        spec = spec_of_run(given["workdir"])
    elif "model" in given:
        if hasattr(flags, "weights") and is_folder(given["model"]):
            given.setdefault("weights", given["model"])
        if hasattr(flags, "weights") and "weights" not in given:
            raise InputError("--weights=FILE is needed: random weights would show nothing")
        spec = spec_of_name(given["model"], given.get("weights"))
    else:
        raise InputError("give --model=NAME, or --workdir=DIR of a training run; see --help")
    if "plan" in given:
        for name in ("reducer", "layers", "multiple_of"):
            if name in given:
                raise InputError(f"--plan says which counts and reducer; leave out --{name}")
        sizes = {name: value for name, value in spec.settings.items() if name not in PLAN_FIELDS}
        spec = dataclasses.replace(spec, settings=sizes | read_plan(given["plan"]))
    if "reducer" in given:
        spec = spec.with_reducer(given["reducer"])

    changes = {name: given[name] for name in ("num_classes", "dtype") if name in given}
    if size := parse_size(given.get("image_size")):
        changes["image_size"] = size
    if layers := numbers(given.get("layers", ""), int):
        changes["layers"] = layers
    if not several and (multiples := numbers(given.get("multiple_of", ""), int)):
        if len(multiples) > 1:
            raise InputError(f"--multiple_of takes one number here, got {given['multiple_of']}")
        changes["multiple_of"] = multiples[0]
    return dataclasses.replace(spec, settings=spec.settings | changes)


def spec_of_name(text: str, weights: str | None = None) -> ModelSpec:
    """ "deit_tiny_patch16_224" or "vit:width=192,depth=6" -> that model.

    Raises:
      InputError: a setting that is not a size.
    """
    name, _, rest = text.partition(":")
    sizes = parse_fields(rest)
    if taken := sorted(FLAGGED & sizes.keys()):
        raise InputError(f"--model={text}: {taken[0]} is no size of the model; see --help")
    return ModelSpec(text, dict(name=name) | sizes, weights=weights)


def spec_of_run(workdir: str) -> ModelSpec:
    """The model of a run; one trained for several keep rates is planned for the smallest."""
    config = read_config(workdir)
    settings = dict(config["model"])
    if config.get("sandwich") and not settings.get("keep_rate"):
        settings["keep_rate"] = min(config["sandwich"])
    return ModelSpec(workdir, settings, workdir=workdir, config=config)
