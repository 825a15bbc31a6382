# SPDX-License-Identifier: Apache-2.0
"""A folder of images without classes, for tools that can do without labels."""

from pathlib import Path

from PIL import Image

from evit_jax.errors import InputError


class Unlabeled:
    """The images directly in a folder, sorted by name; every label is 0.

    It is what `open_source` returns, with no `classes`.
    """

    def __init__(self, folder: Path):
        formats = Image.registered_extensions().items()
        extensions = {extension for extension, kind in formats if kind in Image.OPEN}
        self.classes = ()
        self.files = sorted(
            path
            for path in folder.iterdir()
            if path.name[0] != "." and path.suffix.lower() in extensions
        )
        if not self.files:
            raise InputError(f"{folder} has neither class folders nor images in it")

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict:
        path = self.files[index]
        return {"image": path.read_bytes(), "label": 0, "name": str(path)}


def without_classes(folder: Path) -> bool:
    """Whether it is a folder in which there are no folders."""
    return folder.is_dir() and not any(
        entry.is_dir() and entry.name[0] != "." for entry in folder.iterdir()
    )
