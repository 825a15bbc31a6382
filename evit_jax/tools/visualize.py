# SPDX-License-Identifier: Apache-2.0
"""Draws which patches of images a model keeps, fuses and drops, block by block.

python -m evit_jax.tools.visualize --model=NAME --weights=FILE --keep_rate=0.7 --out=FILE.png \\
    [--reducer=evit:fuse=False] [--image_size=H,W] [--classes=FILE] IMAGE...
python -m evit_jax.tools.visualize --workdir=runs/digits --out=FILE.png [IMAGE...]

With --workdir the model, its keep rate and the names of the classes are those of a training run;
where no image is named, a few of its own test images are drawn. Models of 1000 classes by name have
ImageNet's names, unless --classes has others; else classes have numbers.

A row per image: as the model sees it, what its class token attends to where the first block
decides, and the patches after every reducing block (six of them at most). The last line of standard
output is a JSON object: per image the predictions, dense and reduced, and per reducing block how
many patches are still on their own (`kept`), share a token (`fused`) and are gone (`dropped`).
"""

import argparse
import functools
import io
import json
import os
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from PIL import Image

from evit_jax import cli
from evit_jax.data import read_classes
from evit_jax.data.augment import center_crop, decode
from evit_jax.data.names import imagenet_names
from evit_jax.errors import InputError
from evit_jax.models import preprocessing
from evit_jax.models.named import table
from evit_jax.pictures import patches
from evit_jax.runtime.parallel import DataParallel
from evit_jax.storage import read, write_whole
from evit_jax.training.trained import ModelSpec, open_spec, open_test_data

EXAMPLES = 4  # of a run's data, where no image is named
MAX_PANELS = 6  # of reducing blocks; the figures on standard output are of all


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    cli.add_model_flags(parser, "model", "weights", "workdir")
    add("--keep_rate", type=float, help="fraction of the patches kept by each reducing block")
    cli.add_model_flags(
        parser, "plan", "reducer", "layers", "multiple_of", "image_size", "num_classes"
    )
    add("--classes", type=Path, metavar="FILE", help="JSON list of names, in class order")
    add("--out", type=Path, required=True, metavar="FILE.png")
    add("images", nargs="*", type=Path, metavar="IMAGE")
    options = parser.parse_args(arguments)
    if not (options.images or options.workdir):
        raise InputError("name an image to look at, or --workdir=DIR of a run with images to test")
    check_out(options.out, options.images)
    return options


def check_out(path: Path, images: list[Path]) -> None:
    """Raises InputError, before anything is computed, if the picture cannot be written there."""
    if path.suffix.lower() != ".png":
        raise InputError(f"--out must be a .png file, got {path}")
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise InputError(f"--out={path} cannot be written: no such folder, or not a writable one")
    if any(image.exists() and path.exists() and image.samefile(path) for image in images):
        raise InputError(f"--out={path} is one of the images to look at and would be lost")


class View(NamedTuple):
    """An image to look at."""

    name: str
    picture: object  # uint8 array or encoded bytes
    label: str | None = None  # its class, where it is known


def open_views(options: argparse.Namespace, spec: ModelSpec) -> tuple[list[View], list[str] | None]:
    """(the images, the names of the classes where flags or data say so, else None)."""
    names = options.classes and list(read_classes(options.classes, unique=False))
    if options.images:
        views = [View(str(path), read(path)) for path in options.images]
        return views, names
    source = open_test_data(spec.config)
    names = names or list(source.classes)
    views = []
    for example in varied_examples(source, EXAMPLES):
        label = names[example["label"]] if example["label"] < len(names) else None
        views.append(View(example["name"], example["image"], label))
    return views, names


def class_names(spec: ModelSpec, classes: int) -> list[str] | None:
    """What the classes are called where nobody says so; None: nobody knows."""
    if spec.config:
        names = names_of_run(spec.config)
        return names and (names + [str(i) for i in range(len(names), classes)])[:classes]
    if classes == 1000 and spec.name.partition(".")[0] in table():
        return list(imagenet_names())
    return None


def names_of_run(config: dict) -> list[str] | None:
    """The names of the classes that a run was trained on, None where its data is not at hand."""
    try:
        return list(open_test_data(config).classes)
    except (InputError, OSError) as error:
        print(f"classes have numbers for names: {error}", file=sys.stderr)
        return None


def varied_examples(source, count: int) -> list[dict]:
    """Examples of different classes, as far as some that lie all over the data have them."""
    spread = np.unique(np.linspace(0, len(source) - 1, 10 * count).round().astype(int))
    looked = [source[int(i)] for first in range(10) for i in spread[first::10]]
    first_of = {example["label"]: i for i, example in reversed(list(enumerate(looked)))}
    order = sorted(range(len(looked)), key=lambda i: (first_of[looked[i]["label"]] != i, i))
    return [looked[i] for i in order[:count]]


def compile_look(model, card):
    """(params, uint8 image (1, H, W, 3)) -> all that is drawn and said of one image."""
    dense = model.clone(keep=())
    first = next(block for block, keep in enumerate(model.keep) if keep is not None)
    # A method at its block's input reads the attention of the block before.
    read = max(first - 1, 0) if model.reducer.site == "input" else first

    def look(params, images):
        images = card.normalize(images)
        dense_logits, plain = dense.apply({"params": params}, images)
        logits, out = model.apply({"params": params}, images)
        return dict(
            dense=jax.nn.softmax(dense_logits[0]),
            reduced=jax.nn.softmax(logits[0]),
            # Nothing is reduced yet where the first reducing block reads attention, and this is
            # what it decides by, or what comes nearest to it where there is no class token.
            attention=(plain["cls_attention"] or plain["mean_attention"])[read][0, model.prefix :],
            owners=[owner[0] for owner in out["owner"]],
        )

    return DataParallel(jax.devices()[:1]).compile_eval(look)


def figures(seen: dict, view: View, classes: list[str] | None) -> dict:
    """The numbers of one image for standard output."""
    row = dict(image=view.name) | ({} if view.label is None else dict(label=view.label))
    for variant in ("dense", "reduced"):
        best = int(seen[variant].argmax())
        label = classes[best] if classes else best
        row[variant] = {"class": label, "probability": float(seen[variant][best])}
    states = [patches.patch_states(owner) for owner in seen["owners"]]
    for name in ("kept", "fused", "dropped"):
        code = getattr(patches, name.upper())
        row[name] = [int((state == code).sum()) for state in states]
    return row


def draw_row(view: Image.Image, seen: dict, row: dict, model, blocks: list[int]) -> patches.Row:
    """The image, the attention, and the reducing blocks, evenly thinned out if there are many."""
    cell = patches.cell_size(model.image_size, model.grid)
    base = patches.base_panel(view, model.grid, cell)
    panels = [base, patches.attention_panel(base, seen["attention"], model.grid, cell)]
    labels = [Path(row["image"]).name, f"class attention, block {blocks[0]}"]
    count = min(len(blocks), MAX_PANELS)
    for i in sorted({round(i) for i in np.linspace(len(blocks) - 1, 0, count)}):
        panels.append(patches.patches_panel(base, seen["owners"][i], model.grid, cell))
        labels.append(f"block {blocks[i]}: {row['kept'][i]} of {model.patches}")
    said = [
        f"{variant}: {row[variant]['class']}  {row[variant]['probability']:.1%}"
        for variant in ("dense", "reduced")
    ]
    if "label" in row:
        said.insert(0, f"class: {row['label']}")
    return patches.Row(panels, labels, "  |  ".join(said))


def write_png(path: Path, image: Image.Image) -> None:
    """A PNG of 256 colors, half the size of one of all, that is never seen half written."""
    content = io.BytesIO()
    colors = image.quantize(256, kmeans=1)
    dither = Image.Dither.FLOYDSTEINBERG  # without it skies have bands
    image.quantize(palette=colors, dither=dither).save(content, "PNG", optimize=True)
    write_whole(path, content.getvalue())


def visualize(options: argparse.Namespace) -> dict:
    """Draws the picture and returns the figures."""
    spec = open_spec(options)
    views, classes = open_views(options, spec)
    if classes and spec.config is None and options.num_classes is None:
        options.num_classes = len(classes)
        spec = open_spec(options)
    model = spec.build(keep_rate=options.keep_rate)
    blocks = [block for block, keep in enumerate(model.keep) if keep is not None]
    if not blocks:
        raise InputError("no block reduces its tokens; ask for it, as with --keep_rate=0.7")
    if options.classes and len(classes) != model.num_classes:
        raise InputError(
            f"--classes={options.classes} has {len(classes)} names and the model "
            f"{model.num_classes} classes"
        )
    if not classes:
        classes = class_names(spec, model.num_classes)
    elif len(classes) < model.num_classes:
        classes += map(str, range(len(classes), model.num_classes))
    params = spec.load_params(model)

    card = preprocessing(spec.name)
    view_of = functools.partial(center_crop, size=model.image_size, **card.view)
    pictures = [view_of(decode(view.picture, view.name)) for view in views]
    look = compile_look(model, card)
    rows, images = [], []
    for number, (view, picture) in enumerate(zip(views, pictures, strict=True), start=1):
        print(f"image {number}/{len(views)}: {view.name}", file=sys.stderr)
        seen = jax.device_get(look(params, np.asarray(picture)[None]))
        images.append(figures(seen, view, classes))
        rows.append(draw_row(picture, seen, images[-1], model, blocks))

    title = [spec.label, f"reducer {spec.reducer}"]
    rate = spec.keep_rate if options.keep_rate is None else options.keep_rate
    if rate is not None:
        title.append(f"keep rate {rate:g}")
    states = {
        getattr(patches, name.upper())
        for name in ("kept", "fused", "dropped")
        if any(any(row[name]) for row in images)
    }
    write_png(options.out, patches.page(rows, ", ".join(title), states))
    return dict(out=str(options.out), blocks=blocks, patches=model.patches, images=images)


def main(arguments: list[str] | None = None) -> None:
    cli.guard(lambda: print(json.dumps(visualize(parse(arguments)))))


if __name__ == "__main__":
    main()
