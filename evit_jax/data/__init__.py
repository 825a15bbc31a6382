# SPDX-License-Identifier: Apache-2.0
"""From files to batches of uint8 images: random-access sources and one Grain pipeline.

A data set is one file in `sources/`, found by its file name. It defines

    def source(split, folder): ...   # split is "train" or "test"; folder is config.data.dir or ""

which returns an object with `classes` (the class names, in label order), `len()` and `[index]` ->

    {"image": encoded bytes or a uint8 array (H, W) or (H, W, 3), "label": int, "name": str}

`name` says which image it is in error messages. Nothing here imports JAX.
"""

import importlib
import pkgutil

from evit_jax.data import sources
from evit_jax.errors import check_name


def known_sources() -> list[str]:
    """The names of all data sets: the files in sources/."""
    return sorted(module.name for module in pkgutil.iter_modules(sources.__path__))


def open_source(name: str, split: str, folder: str = "", **options):
    """Opens the split "train" or "test" of a data set; `options` are the data set's own.

    Raises:
      InputError: an unknown name, or nothing usable in the folder.
    """
    check_name("data set", name, known_sources())
    return importlib.import_module(f"{sources.__name__}.{name}").source(split, folder, **options)
