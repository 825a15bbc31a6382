# SPDX-License-Identifier: Apache-2.0
"""Class folders: DIR/train/CLASS/... and DIR/val/CLASS/... with images in any Pillow format."""

import os
from pathlib import Path

from PIL import Image

from evit_jax.errors import InputError

TEST_NAMES = ("val", "test", "validation")


class Folder:
    """The images under a folder of class folders, at any depth, in sorted order."""

    def __init__(self, folder: Path, classes: tuple[str, ...]):
        formats = Image.registered_extensions().items()
        extensions = {extension for extension, kind in formats if kind in Image.OPEN}
        self.classes, self.files, self.labels = classes, [], []
        present = class_names(folder)
        unknown = sorted(set(present) - set(classes))
        if unknown:
            raise InputError(f"{folder / unknown[0]} is not among the {len(classes)} known classes")
        for name in present:
            found = sorted(
                os.path.join(parent, file)
                for parent, _, files in os.walk(folder / name)
                for file in files
                if not file.startswith(".") and Path(file).suffix.lower() in extensions
            )
            if not found:
                raise InputError(
                    f"{folder / name} is a class folder without images; remove it or fill it"
                )
            self.files += found
            self.labels += [classes.index(name)] * len(found)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict:
        return self.describe(index) | {"image": Path(self.files[index]).read_bytes()}

    def describe(self, index: int) -> dict:
        """The element without its image."""
        return {"label": self.labels[index], "name": self.files[index]}


def class_names(folder: Path) -> tuple[str, ...]:
    """The class folders in a folder, sorted; raises InputError if there is none."""
    names = sorted(
        entry.name for entry in os.scandir(folder) if entry.is_dir() and entry.name[0] != "."
    )
    if not names:
        raise InputError(f"{folder} has no class folders in it")
    return tuple(names)


def source(split: str, folder: str, classes: tuple[str, ...] | None = None) -> Folder:
    """Labels are places in `classes`, by default the sorted class folders of train/.

    For testing, `folder` may also be the one that holds the class folders themselves.
    """
    if not folder:
        raise InputError(
            "the data set 'folder' needs a folder with train/ and val/: --config.data.dir=FOLDER"
        )
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise InputError(f"{root} is not a folder; give the one that holds train/ and val/")
    names = ("train",) if split == "train" else TEST_NAMES
    found = [root / name for name in names if (root / name).is_dir()]
    train = root / "train"
    if not found and split == "test" and not train.is_dir():
        found = [root]
    if not found:
        inside = ", ".join(sorted(entry.name for entry in os.scandir(root))[:5]) or "nothing"
        raise InputError(f"{root} has no folder {' or '.join(names)} in it; it has {inside}")
    return Folder(found[0], classes or class_names(train if train.is_dir() else found[0]))
