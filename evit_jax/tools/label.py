# SPDX-License-Identifier: Apache-2.0
"""Makes the label maps for token labeling: what a model sees in each patch of training images.

python -m evit_jax.tools.label --model=NAME --weights=FILE --data=FOLDER --out=FOLDER \\
    [--image_size=384] [--top=5] [--classes=FILE.json] [--picture=FILE.png]

FOLDER holds train/ with class folders, or class folders, or a TFDS set prepared as ArrayRecord. Of
each image the annotator sees the whole, squeezed into a square; it runs dense. A patch's logits are
those of the model's head for patches (LV-ViT), else of its head for images, with the last norm
before it. The largest of them and their classes go to OUT/CLASS/STEM.npz, `logits` float16 and
`ids` int16 (top, rows, columns), for --config.labels.dir=OUT. Maps that are there are kept, so
rerun the same command to resume. --picture draws some images as training will see them, with the
maps over their crops: to look at before a long run.

The last line of standard output is a JSON object: how many maps were made, were there and could not
be made because their images are damaged.
"""

import argparse
import collections
import contextlib
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
from tqdm import tqdm

from evit_jax import cli
from evit_jax.data import pipeline
from evit_jax.data.augment import decode
from evit_jax.data.labels import (
    LabelMap,
    file_name,
    map_path,
    read_label_map,
    write_label_map,
)
from evit_jax.data.view import View
from evit_jax.errors import InputError
from evit_jax.models import preprocessing
from evit_jax.models.layers import norm
from evit_jax.pictures import labels as drawing
from evit_jax.pictures import patches
from evit_jax.runtime.parallel import Chunked, DataParallel
from evit_jax.tools.evaluate import BATCH_SIZE, is_tfds, open_folder
from evit_jax.tools.visualize import check_out, write_png
from evit_jax.training.labeling import crop_map, dense_map
from evit_jax.training.trained import open_spec

EXAMPLES = 4  # images of the picture
GRID = 14, 14  # of its crops
PANEL = 168, 168  # pixels


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    cli.add_model_flags(parser, "model", "weights", "workdir", "image_size", "num_classes", "dtype")
    add("--data", required=True, help="folder with train/, class folders, or a TFDS set")
    add("--classes", help="JSON list of folder names in class order")
    add("--out", required=True, type=Path, help="folder for the maps")
    add("--top", type=int, default=5, help="logits kept of each patch")
    add("--batch_size", type=int, help="images at a time, over all devices; default 50 or more")
    add("--threads", type=int, default=0, help="decoding threads; 0 is one per processor")
    add("--picture", type=Path, metavar="FILE.png", help="draw some images with their maps")
    flags = parser.parse_args(arguments)
    if flags.threads < 0:
        raise InputError(f"--threads must be 0 or more, got {flags.threads}")
    if flags.picture:
        check_out(flags.picture, [])
    return flags


class Missing:
    """The images of a source without a map."""

    def __init__(self, source, indices: list[int]):
        self.source, self.indices, self.classes = source, indices, source.classes

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict:
        return self.source[self.indices[index]]


def check_annotator(model, top: int) -> None:
    """Raises InputError unless the model can classify patches, into so many classes."""
    if not model.num_classes or model.pool == "map":
        raise InputError("this model has no head that could classify a patch; take another one")
    if not 1 <= top <= model.num_classes:
        raise InputError(f"--top must be in [1, {model.num_classes}], got {top}")


def patch_logits(model, params: dict, images: jax.Array) -> jax.Array:
    """(B, P, C) float32 of normalized images; the model keeps all patches."""
    _, out = Chunked(model).apply({"params": params}, images)
    if "patch_logits" in out:
        return out["patch_logits"]
    x = out["dense"]
    if "fc_norm" in params:
        x = norm(None, model.norm, model.norm_eps).apply({"params": params["fc_norm"]}, x)
    heads = [params[name] for name in ("head", "head_dist") if name in params]
    return sum(x @ head["kernel"] + head["bias"][None, None] for head in heads) / len(heads)


def compile_annotator(model, card, devices: DataParallel, top: int):
    """(params, batch) -> logits (B, top, h, w) float16 and ids int16 of its images."""

    def annotate(params, batch):
        values = patch_logits(model, params, card.normalize(batch["image"]))
        found = jax.lax.top_k(values, top)
        logits, ids = (jnp.moveaxis(array.reshape(-1, *model.grid, top), -1, 1) for array in found)
        return dict(logits=logits.astype(jnp.float16), ids=ids.astype(jnp.int16))

    return devices.compile_eval(annotate)


def open_data(flags: argparse.Namespace):
    """The images to label."""
    folder = Path(flags.data).expanduser()
    split = "train" if (folder / "train").is_dir() or is_tfds(folder) else "test"
    return open_folder(flags, flags.data, split, flags.classes)


def path_of(flags: argparse.Namespace, source, index: int) -> Path:
    """Where the map of an image of the source goes."""
    element = getattr(source, "describe", source.__getitem__)(index)
    name = source.classes[element["label"]]
    return map_path(flags.out.expanduser(), name, file_name(element)).with_suffix(".npz")


def label(flags: argparse.Namespace) -> dict:
    """Makes the maps that are missing and returns the figures."""
    spec = open_spec(flags)
    model = spec.build(keep_rate=1.0)
    check_annotator(model, flags.top)
    card = preprocessing(spec.name)
    source = open_data(flags)
    if len(source.classes) > model.num_classes:
        raise InputError(
            f"the data has {len(source.classes)} classes and the annotator {model.num_classes}"
        )
    devices = DataParallel()
    count = jax.device_count()
    batch_size = flags.batch_size or -(-BATCH_SIZE // count) * count
    devices.check_batch_size("--batch_size", batch_size)

    paths = [path_of(flags, source, index) for index in range(len(source))]
    if len(set(paths)) < len(paths):
        path, times = collections.Counter(paths).most_common(1)[0]
        raise InputError(
            f"{times} images would have the map {path}: a map is called as its image up to the "
            "first dot, so rename the images"
        )
    missing = [index for index, path in enumerate(paths) if not path.exists()]
    params = devices.init(dict, spec.load_params(model))
    annotate, damaged = compile_annotator(model, card, devices, flags.top), 0
    batches = pipeline.eval_batches(
        Missing(source, missing),
        size=model.image_size,
        crop=1.0,
        interpolation=card.interpolation,
        squash=True,  # a map is of the whole image
        batch_size=batch_size,
        threads=flags.threads,
        damaged="skip",
    )
    bar = tqdm(total=len(source), initial=len(source) - len(missing), unit="map", disable=None)
    with contextlib.closing(batches), bar:
        for batch in batches:
            batch, host = pipeline.split_host_arrays(batch)
            maps = jax.device_get(annotate(params, devices.put(batch)))
            for row, number in enumerate(host["index"].tolist()):
                if number >= len(missing):
                    break  # padding
                bar.update()
                if host["damaged"][row]:
                    damaged += 1
                    name = source[missing[number]]["name"]
                    tqdm.write(f"skipped damaged image: {name}", file=sys.stderr)
                    continue
                found = LabelMap(*(maps[name][row] for name in LabelMap._fields))
                write_label_map(paths[missing[number]], found)

    figures = dict(
        out=str(flags.out),
        made=len(missing) - damaged,
        there=len(source) - len(missing),
        damaged=damaged,
        shape=[flags.top, *model.grid],
    )
    if flags.picture:
        write_png(flags.picture, picture(flags, source, card))
        figures["picture"] = str(flags.picture)
    return figures


def picture(flags: argparse.Namespace, source, card) -> Image.Image:
    """Some images, whole and as training sees them, each with its map."""
    view = View(
        size=(224, 224),
        crop="resized",
        scale=(0.08, 1.0),
        ratio=(3 / 4, 4 / 3),
        flip=True,
        three_augment=False,
        randaugment_magnitude=9.0,
        randaugment_std=0.5,
        randaugment_layers=2,
        color_jitter=0.0,
        interpolation=card.interpolation,
        fill=card.fill,
    )
    chosen = np.unique(np.linspace(0, len(source) - 1, EXAMPLES).round().astype(int)).tolist()
    return patches.page(
        [draw_row(flags, source, view, index) for index in chosen],
        f"label maps in {flags.out}: the class of each cell, stronger where it is surer",
        set(),
    )


def draw_row(flags: argparse.Namespace, source, view: View, index: int) -> patches.Row:
    """One image of the picture: whole, its map, a training view of it, the map of that."""
    element = source[index]
    path = path_of(flags, source, index)
    if not path.exists():
        raise InputError(f"{element['name']} has no map to draw: its image is damaged")
    image, found = decode(element["image"], element["name"]), read_label_map(path)
    example = view.labeled(image, found, np.random.default_rng(index))
    classes = int(max(found.ids.max(), element["label"])) + 1
    whole = shown(found.logits, found.ids, classes)
    crop = shown(example["label_logits"], example["label_ids"], classes, example["label_box"], GRID)
    colored = drawing.leading(np.concatenate([whole[0], crop[0]]))
    surest = max(whole[1].max(), crop[1].max())
    panels = []
    for pixels, (seen, weights), grid in (
        (image, whole, found.ids.shape[1:]),
        (Image.fromarray(example["image"]), crop, GRID),
    ):
        cell = patches.cell_size((224, 224), grid)
        base = patches.base_panel(pixels, grid, cell)
        painted = drawing.labels_panel(base, seen, weights / surest, colored, grid, cell)
        panels += [
            np.asarray(Image.fromarray(panel).resize(PANEL, Image.Resampling.NEAREST))
            for panel in (base, painted)
        ]
    known = flags.classes is not None or len(source.classes) > max(colored)
    names = ", ".join(str(source.classes[c]) if known else str(c) for c in colored)
    labels = [file_name(element), "its map", "in training", "the map in training"]
    return patches.Row(panels, labels, f"class {source.classes[element['label']]}; seen: {names}")


def shown(logits, ids, classes: int, box=(0.0, 0.0, 1.0, 1.0), grid=None):
    """The likeliest class (P,) of each cell of a map, or of a crop of it, and its probability."""
    maps = dense_map(jnp.asarray(logits)[None], jnp.asarray(ids)[None], classes)
    if grid:
        maps = crop_map(maps, jnp.asarray(box)[None], grid)
    chances = np.asarray(jax.nn.softmax(maps)).reshape(-1, classes)
    return chances.argmax(axis=1), chances.max(axis=1)


def main(arguments: list[str] | None = None) -> None:
    cli.guard(lambda: print(json.dumps(label(parse(arguments)))))


if __name__ == "__main__":
    main()
