# SPDX-License-Identifier: Apache-2.0
"""Models by name.

A backbone is one file of this folder with `MODEL`, its Linen module; its published variants are in
the table of named.py, or in `VARIANTS` of the file itself. `create_model("vit", width=48, ...)`
builds a backbone from settings, `create_model("deit_small_patch16_224")` a variant, with settings
to change.
"""

import dataclasses
import difflib
import fnmatch
import inspect
import operator
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from evit_jax.errors import InputError, check_name, check_names
from evit_jax.models import folder, named
from evit_jax.models.card import Preprocessing
from evit_jax.models.likeness import looks_like
from evit_jax.models.named import backbones
from evit_jax.plan.files import read_plan
from evit_jax.reducers import create_reducer
from evit_jax.tokens import Reducer
from evit_jax.weights import files, hub
from evit_jax.weights.names import params_from_tensors, with_timm_names


def find_model(name: str):
    """A name as for `create_model` -> (Linen class, its settings, Preprocessing)."""
    modules = backbones()
    if name in modules:
        return modules[name].MODEL, {}, Preprocessing()
    if folder.is_folder(name):
        backbone, settings, card = folder.find(name)
    else:
        base, _, tag = name.partition(".")
        check_name("model", base, [*modules, *named.table()])
        if base in modules:
            raise InputError(f"the backbone {base!r} has no tags, got {tag!r}")
        backbone, settings, card = named.find(name)
    return modules[backbone].MODEL, settings, card


def list_models(pattern: str = "*", *, tags: bool = False) -> list[str]:
    """The names that `create_model` takes, sorted: backbones and the variants that timm names.

    Args:
      pattern: which of them, with * for any characters and ? for one, such as "*tiny*".
      tags: variants once for each of their tags instead, without backbones.

    Raises:
      InputError: no name matches; the text names the closest one.
    """
    known = named.names(tags=True) if tags else [*backbones(), *named.names()]
    found = sorted(fnmatch.filter(known, pattern))
    if not found:
        closest = difflib.get_close_matches(pattern.strip("*"), known, n=1, cutoff=0)[0]
        raise InputError(f"no model is called {pattern!r}; the closest name is {closest!r}")
    return found


def preprocessing(name: str) -> Preprocessing:
    """What the named model expects of its images."""
    return find_model(name)[2]


def build_model(
    name: str,
    *,
    keep_rate: float | None = None,
    layers: tuple[int, ...] | None = None,
    keep_rates: tuple[float, ...] | None = None,
    tokens: int | tuple[int | None, ...] | None = None,
    macs: float | None = None,
    multiple_of: int = 1,
    plan: str | None = None,
    reducer: str | Mapping | Reducer = "evit",
    **settings,
):
    """The Linen module alone, without parameters; arguments as in `create_model`."""
    if plan:
        others = dict(keep_rate=keep_rate, layers=layers, keep_rates=keep_rates, tokens=tokens)
        if any(value is not None for value in (*others.values(), macs)):
            raise InputError("a plan has its own counts: leave out keep rates, tokens and macs")
        tokens, reducer = operator.itemgetter("tokens", "reducer")(read_plan(plan))
    module, defaults, _ = find_model(name)
    fields = [field.name for field in dataclasses.fields(module)]
    own = [field for field in fields if field not in ("keep", "reducer", "parent", "name")]
    taken = list(inspect.signature(build_model).parameters)
    check_names(f"setting of {name}", settings, [*own, *taken[:-1]])
    settings = defaults | {key: value for key, value in settings.items() if value is not None}
    for side in ("image_size", "patch_size"):
        if side in settings:
            settings[side] = check_size(side, settings[side])
    if "dtype" in settings:
        settings["dtype"] = check_dtype(settings["dtype"])
    model = module(**settings, reducer=create_reducer(reducer))
    model.check()
    keep = model.plan(
        keep_rate=keep_rate,
        layers=layers,
        keep_rates=keep_rates,
        tokens=tokens,
        macs=macs,
        multiple_of=multiple_of,
    )
    return model.clone(keep=keep)


def create_model(
    name: str, *, weights: str | None = None, new_head: bool = False, seed: int = 0, **settings
):
    """Builds a model and its parameters.

    Args:
      name: a backbone ("vit"), a variant that timm names, with or without the tag of its weights
        ("deit_small_patch16_224", "vit_small_patch14_reg4_dinov2.lvd142m"), or a folder with a
        config.json of Hugging Face transformers, whose weights are then the default.
      weights: a file of timm, of the model's authors (.safetensors, .pth, .npz) or of transformers,
        such a folder, or "hf:OWNER/REPOSITORY[@COMMIT][:FILE]" on the Hugging Face hub; default
        randomly initialized. Position embeddings of another image size are resized.
      new_head: initialize new heads where the file has none, or for another number of classes.
      seed: of randomly initialized weights.
      keep_rate: fraction of the patch tokens kept by each block in `layers`; default 1.
      layers: reducing blocks, 0-based; default the reducer's own (EViT: 3, 6, 9 of 12).
      keep_rates: one rate per block, instead of keep_rate and layers.
      tokens: absolute counts instead of rates, one per layer or per block.
      macs: a budget instead, multiply-accumulates of one image: the largest keep rate within it.
      multiple_of: rounds the tokens after each reducing block, all of them, up to a multiple.
      plan: a file with counts and their reducer instead, such as `calibrate` writes.
      reducer: "evit", "evit:fuse=False", dict(name="evit", fuse=False) or a Reducer.
      **settings: fields of the backbone, such as image_size, num_classes, drop_path_rate, dtype.

    Returns:
      (Linen module, parameters as a nested dict of float32 arrays). Models of the same name that
      differ only in keep rate or reducer share their parameters.

    Raises:
      InputError: an unknown name or setting, one out of range, or weights that do not fit.
    """
    model = build_model(name, **settings)
    key = jax.random.key(seed)
    if weights is None and folder.is_folder(name):
        weights = name
    if weights is None:
        return model, init_params(model, key)
    return model, load_params(weights, model, key=key, new_head=new_head)


def load_params(weights: str, model, *, key: jax.Array, new_head: bool = False) -> dict:
    """Parameters for `model` from a file or the hub, see `create_model`."""
    path = hub.download(weights) if weights.startswith("hf:") else weights
    if folder.is_folder(path):
        folder.check(path, model)
    tensors = files.read_tensors(path)
    if new_head or isinstance(model.reducer, nn.Module):  # some of it may be kept
        fresh = init_params(model, key)
    else:  # only shapes are looked at
        fresh = jax.eval_shape(lambda key: init_params(model, key), key)
    try:
        return params_from_tensors(tensors, model, fresh, new_head=new_head)
    except InputError as error:
        looks = looks_like(with_timm_names(tensors), model)
        raise InputError(f"{weights}: {error}{looks}") from None


def init_params(model, key: jax.Array) -> dict:
    """Draws the parameters without running the model."""
    images = jax.ShapeDtypeStruct((1, *model.image_size, 3), jnp.float32)
    return model.lazy_init(key, images)["params"]


def check_size(name: str, size: int | tuple[int, int]) -> tuple[int, int]:
    """One side, (side,) or (height, width) -> (height, width)."""
    size = (size,) if isinstance(size, (int, float)) else tuple(size)
    size = size * 2 if len(size) == 1 else size
    if len(size) != 2 or not all(type(side) is int and side > 0 for side in size):
        raise InputError(f"{name} must be a positive whole number or (height, width), got {size}")
    return size


def check_dtype(dtype) -> jnp.dtype:
    """ "float32", "bfloat16" or "float16", or the dtype itself."""
    name = dtype if isinstance(dtype, str) else jnp.dtype(dtype).name
    return jnp.dtype(check_name("dtype", name, ("float32", "bfloat16", "float16")))
