# SPDX-License-Identifier: Apache-2.0
"""A TensorFlow Datasets set prepared as ArrayRecord, read without TensorFlow.

data.dir is the prepared set itself, such as ~/tensorflow_datasets/imagenet2012 or one of its
version folders, on a disk or in a bucket (gs://, with the extra `gcs`), from which ArrayRecord's
own client reads single examples. Preparing is a step of its own, done once (some sets need the
`tf` extra for it):

    python -c "import tensorflow_datasets as tfds; tfds.builder('cifar10', \\
        file_format='array_record').download_and_prepare()"
"""

import re
from pathlib import Path

import tensorflow_datasets as tfds

from evit_jax import storage
from evit_jax.errors import InputError


class Tfds:
    """Encoded images of a split, one read per access."""

    def __init__(self, builder, split: str):
        decoders = {"image": tfds.decode.SkipDecoding()}
        self.examples = builder.as_data_source(split, decoders=decoders)
        self.classes = tuple(builder.info.features["label"].names)
        self.name = f"{builder.info.full_name} {split}"

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict:
        example = self.examples[index]
        name = f"{self.name} example {index}"
        file = example.get("file_name", f"{index}")
        return {
            "image": example["image"],
            "label": int(example["label"]),
            "name": name,
            "file": file.decode() if isinstance(file, bytes) else str(file),
        }


def prepared_folder(folder: Path) -> Path:
    """The folder with dataset_info.json: this one, or the newest version folder in it."""
    if (folder / "dataset_info.json").exists():
        return folder
    levels = ("*", "*/*", "*/*/*")  # NAME/CONFIG/VERSION; a bucket is not searched any deeper
    found = [path.parent for at in levels for path in folder.glob(f"{at}/dataset_info.json")]
    if not found:
        raise InputError(
            f"{folder} holds no prepared TFDS set (no dataset_info.json in it); prepare one with "
            "tfds.builder(NAME, file_format='array_record').download_and_prepare()"
        )
    return max(found, key=lambda path: [int(part) for part in re.findall(r"\d+", path.name)])


def source(split: str, folder: str) -> Tfds:
    if not folder:
        raise InputError(
            "the data set 'tfds' needs --config.data.dir=FOLDER of a prepared set, such as "
            "~/tensorflow_datasets/imagenet2012"
        )
    with storage.explained(folder):
        builder = tfds.builder_from_directory(prepared_folder(storage.as_path(folder)))
    features = builder.info.features
    if not {"image", "label"} <= set(features) or not hasattr(features["label"], "names"):
        raise InputError(f"{folder} is not image classification; it has {', '.join(features)}")
    file_format = builder.info.file_format
    if file_format is None or file_format.value not in ("array_record", "parquet"):
        raise InputError(
            f"{folder} is stored as {file_format and file_format.value}, which has no random "
            "access; prepare it again with file_format='array_record'"
        )
    names = ("train",) if split == "train" else ("test", "validation")
    splits = builder.info.splits
    # imagenet2012's "test" has no labels to count, its "validation" has; small sets have "test".
    if split == "test" and "validation" in splits and "test" in splits:
        names = ("validation",)
    found = [name for name in names if name in splits]
    if not found:
        raise InputError(f"{folder} has no split {' or '.join(names)}; it has {', '.join(splits)}")
    return Tfds(builder, found[0])
