# SPDX-License-Identifier: Apache-2.0
"""Label maps: what a machine annotator sees in each cell of a whole training image.

Token labeling (https://arxiv.org/abs/2104.10858) keeps of each cell of a grid over the image the
five largest logits and their classes. A folder of such maps has a file for every training image,
ROOT/CLASS/STEM.npz with `logits` float16 and `ids` int16, both (K, h, w), as `tools.label` writes
them; or STEM.pt, a tensor (2, K, h, w) float16 that PyTorch saved, logits and ids, as the paper's
authors publish them. STEM is the name of the image up to its first dot.
"""

import dataclasses
import io
import itertools
from pathlib import Path, PurePath
from typing import NamedTuple

import numpy as np

from evit_jax.errors import InputError
from evit_jax.storage import write_whole
from evit_jax.weights.files import read_tensors

SUFFIXES = ".npz", ".pt"
PUBLISHED = 5, 18, 18  # K, h, w of the maps that the authors publish


class LabelMap(NamedTuple):
    """logits (K, h, w) float16 and class ids (K, h, w) int16 of the cells of one image."""

    logits: np.ndarray
    ids: np.ndarray

    def flipped(self) -> "LabelMap":
        """Left and right exchanged."""
        return LabelMap(self.logits[..., ::-1], self.ids[..., ::-1])

    def warped(self, matrix: tuple[float, ...], width: int, height: int) -> "LabelMap":
        """Moved as an affine map moves the pixels of the image of this size.

        Every cell becomes the one that its center is taken from. Cells from outside the image get
        logits and ids of 0: no class more likely than the others.

        Args:
          matrix: a, b, c, d, e, f in pixels: (x, y) is taken from (a x + b y + c, d x + e y + f).
        """
        rows, columns = self.logits.shape[1:]
        a, b, c, d, e, f = matrix
        y, x = np.mgrid[:rows, :columns] + 0.5
        y, x = y * (height / rows), x * (width / columns)
        row = np.floor((d * x + e * y + f) * (rows / height)).astype(int)
        column = np.floor((a * x + b * y + c) * (columns / width)).astype(int)
        inside = (row >= 0) & (row < rows) & (column >= 0) & (column < columns)
        row, column = np.clip(row, 0, rows - 1), np.clip(column, 0, columns - 1)
        return LabelMap(*(np.where(inside, plane[:, row, column], 0).astype(plane.dtype)
                          for plane in self))  # fmt: skip


@dataclasses.dataclass(frozen=True)
class LabelMaps:
    """The maps of a source's images, all of one shape."""

    folder: str
    classes: tuple[str, ...]  # of the source
    num_classes: int  # of the annotator
    shape: tuple[int, int, int] | None = None  # of each; None: not known yet

    def __call__(self, element: dict) -> LabelMap:
        """The map of an element of the source.

        Raises:
          InputError: there is none, or it is damaged, of another shape or of other classes.
        """
        path = self.path(element)
        if not path.exists():
            raise InputError(
                f"{element['name']} has no label map: neither {path.with_suffix('.npz')} nor .pt "
                "is there; evit_jax.tools.label makes them, and labels.dir='' does without"
            )
        labels = read_label_map(path)
        if self.shape and labels.ids.shape != self.shape:
            raise InputError(f"{path} is of shape {labels.ids.shape}, others of {self.shape}")
        if not 0 <= labels.ids.min() <= labels.ids.max() < self.num_classes:
            raise InputError(
                f"{path} names class {labels.ids.max()}, and the model has {self.num_classes}: "
                "it is of an annotator with other classes"
            )
        return labels

    def path(self, element: dict) -> Path:
        """The file of an element's map, .npz where there is one, else .pt, there or not."""
        place = map_path(self.folder, self.classes[element["label"]], file_name(element))
        npz, pt = map(place.with_suffix, SUFFIXES)
        return npz if npz.exists() else pt


def open_label_maps(folder: str, source, num_classes: int) -> LabelMaps:
    """The maps in a folder for the images of a source, of the shape of the first that is there.

    Raises:
      InputError: none of the first hundred images has one. A few, damaged ones, may have none.
    """
    maps = LabelMaps(str(Path(folder).expanduser()), tuple(source.classes), num_classes)
    elements = map(getattr(source, "describe", source.__getitem__), range(min(len(source), 100)))
    first = next(elements)
    every = itertools.chain([first], elements)
    mapped = next((element for element in every if maps.path(element).exists()), first)
    return dataclasses.replace(maps, shape=maps(mapped).ids.shape)


def file_name(element: dict) -> str:
    """What an image of a source is called, without its folder: its file's name where it has one."""
    return PurePath(element.get("file", element["name"])).name


def map_path(folder: str | Path, class_name: str, name: str) -> Path:
    """Where the map of an image is, but for the suffix."""
    return Path(folder) / class_name / name.partition(".")[0]


def read_label_map(path: Path) -> LabelMap:
    """The map in an .npz or .pt file, of which no code runs; raises InputError if it has none."""
    try:
        tensors = read_tensors(path)
    except InputError as error:
        raise InputError(f"the label map {error}") from None
    if tensors.keys() == {"tensor"} and tensors["tensor"].ndim == 4 and len(tensors["tensor"]) == 2:
        logits, ids = tensors["tensor"]
    elif tensors.keys() == {"logits", "ids"}:
        logits, ids = tensors["logits"], tensors["ids"]
    else:
        raise InputError(f"{path} is no label map: it has {', '.join(tensors)}")
    if logits.ndim != 3 or logits.shape != ids.shape or not logits.size:
        raise InputError(f"{path} is no label map: logits {logits.shape}, ids {ids.shape}")
    if not np.isfinite(logits).all() or not np.isfinite(ids).all():
        raise InputError(f"{path} is damaged: not all of its numbers are finite")
    return LabelMap(logits.astype(np.float16), ids.astype(np.int16))


def write_label_map(path: Path, labels: LabelMap) -> None:
    """Writes a map as an .npz file, whole or not at all, and the folder for it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()
    np.savez(content, **labels._asdict())
    write_whole(path, content.getvalue())
