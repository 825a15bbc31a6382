# SPDX-License-Identifier: Apache-2.0
"""Vision Transformers by name: timm's, from the table of facts in names.json, and others.

Others are in `VARIANTS` of their backbone's file, in the form of that table, which
`tests/scripts/timm_names.py` writes.

A name may have a tag, which says whose weights: `vit_small_patch14_reg4_dinov2.lvd142m`. The tag
decides preprocessing, image size and number of classes; a name alone means its first tag, as in
timm.
"""

import functools
import importlib
import importlib.resources
import json
import pkgutil
from pathlib import Path
from types import ModuleType

from evit_jax.errors import InputError, check_name
from evit_jax.models.card import STATISTICS, Preprocessing


@functools.cache
def backbones() -> dict[str, ModuleType]:
    """File name -> module, for every backbone in this folder."""
    names = [module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)])]
    modules = {name: importlib.import_module(f"{__package__}.{name}") for name in names}
    return {name: module for name, module in modules.items() if hasattr(module, "MODEL")}


@functools.cache
def table() -> dict[str, dict]:
    """Name -> backbone, settings, parameters, tags and, where it cannot be built, `missing`."""
    file = importlib.resources.files(__package__) / "names.json"
    found = json.loads(file.read_text())
    for backbone, module in backbones().items():
        for name, entry in getattr(module, "VARIANTS", {}).items():
            found[name] = dict(backbone=backbone, **entry)
    return found


def names(*, tags: bool = False) -> list[str]:
    """All names that can be built, sorted; with tags each once per tag."""
    found = {name: entry for name, entry in table().items() if "missing" not in entry}
    if not tags:
        return sorted(found)
    return sorted(f"{name}.{tag}" for name, entry in found.items() for tag in entry["tags"] if tag)


def find(name: str) -> tuple[str, dict, Preprocessing]:
    """A name with or without tag -> (backbone, its settings, Preprocessing).

    Raises:
      InputError: a tag that the name does not have, or a name that needs what the package lacks.
    """
    name, dot, tag = name.partition(".")
    entry = table()[name]
    if "missing" in entry:
        raise InputError(f"{name} needs {entry['missing']}, which the backbones here do not have")
    tags = entry["tags"]
    card = tags[check_name(f"tag of {name}", tag, tags)] if dot else next(iter(tags.values()))
    card = card if dot else card | entry.get("untagged", {})
    shared = {key: card[key] for key in ("crop", "interpolation", "squash") if key in card}
    resize = dict(position_resize="bicubic_antialias")  # timm's own
    settings = resize | entry["settings"]
    settings |= {
        key: card[key] for key in ("image_size", "num_classes", "position_resize") if key in card
    }
    settings = {key: tuple(v) if isinstance(v, list) else v for key, v in settings.items()}
    return entry["backbone"], settings, Preprocessing(**STATISTICS[card["statistics"]], **shared)
