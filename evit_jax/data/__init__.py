# SPDX-License-Identifier: Apache-2.0
"""From files to batches of uint8 images: random-access sources and one Grain pipeline.

A data set is one file in `sources/`, found by its file name. It defines

    def source(split, folder): ...   # split is "train" or "test"; folder is config.data.dir or ""

which returns an object with `classes` (the class names, in label order), `len()` and `[index]` ->

    {"image": encoded bytes or a uint8 array (H, W) or (H, W, 3), "label": int, "name": str}

`name` says which image it is in error messages, and which label map is its own (`labels.py`); where
it cannot, "file" is the name that does. An object that can tell these without reading the image
has `describe(index)`. The object is pickled for worker processes. Where the
caller may choose the classes, `source` also takes `classes`, their names in label order, or None.
Nothing here imports JAX.
"""

import importlib
import inspect
import json
import pkgutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from evit_jax.data import sources
from evit_jax.data.cache import Cached
from evit_jax.errors import InputError, check_name
from evit_jax.storage import read


def known_sources() -> list[str]:
    """The names of all data sets: the files in sources/."""
    return sorted(module.name for module in pkgutil.iter_modules(sources.__path__))


def open_source(
    name: str,
    split: str,
    folder: str = "",
    *,
    classes: str | Path | Sequence[str] | None = None,
    cache: bool = False,
    copies: int = 1,
):
    """Opens the split "train" or "test" of a data set.

    Args:
      classes: of class folders, the names in the order of the model's classes, or a JSON file with
        a list of them; there may be more of them than folders. Default: the sorted folders.
      cache: keep decoded images in memory from their first use on. A worker process of the pipeline
        shares no memory with the others, so each fills a copy of its own.
      copies: how many processes will do so, to judge whether there is enough memory.

    Raises:
      InputError: an unknown name, nothing usable in the folder, classes that the data set has no
        choice of, or more decoded images than memory.
    """
    check_name("data set", name, known_sources())
    opener = importlib.import_module(f"{sources.__name__}.{name}").source
    options = {}
    if classes:
        if "classes" not in inspect.signature(opener).parameters:
            raise InputError(
                f"the data set {name!r} brings its own classes; a list of classes is for 'folder'"
            )
        given = isinstance(classes, (str, Path))
        options["classes"] = read_classes(classes) if given else tuple(classes)
    source = opener(split, folder, **options)
    return Cached(source, copies=copies) if cache else source


def read_classes(file: str | Path, *, unique: bool = True) -> tuple[str, ...]:
    """The class names, in class order, in a JSON file that is a list of strings.

    Args:
      unique: refuse a name that is there twice. Names of folders are unique; those that are only
        shown need not be: ImageNet has two classes called "crane".

    Raises:
      InputError: no such file, or something else in it.
    """
    content = read(Path(file).expanduser())
    try:
        classes = json.loads(content)
    except ValueError as error:
        raise InputError(f"{file} is not JSON: {error}") from None
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise InputError(f"{file} should be a JSON list of names in class order")
    name, count = Counter(classes).most_common(1)[0] if classes else ("", 0)
    if count != 1 and (unique or not count):
        raise InputError(f"{file} names {f'{name!r} {count} times' if count else 'no classes'}")
    return tuple(classes)
