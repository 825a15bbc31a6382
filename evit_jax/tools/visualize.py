# SPDX-License-Identifier: Apache-2.0
"""Draws which patches of images a model keeps, fuses and drops, block by block.

python -m evit_jax.tools.visualize --model=NAME --weights=FILE --keep_rate=0.7 --out=FILE.png \\
    [--reducer=evit:fuse=False] [--image_size=H,W] [--classes=FILE] IMAGE...

A row per image: as the model sees it, what its class token attends to where the first block
decides, and the patches after every reducing block (six of them at most). The last line of standard
output is a JSON object: per image the predictions, dense and reduced, and per reducing block how
many patches are still on their own (`kept`), share a token (`fused`) and are gone (`dropped`).
"""

import argparse
import io
import json
import os
import sys
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from evit_jax import cli
from evit_jax.data.augment import centre_crop, decode
from evit_jax.errors import InputError
from evit_jax.models import create_model, preprocessing
from evit_jax.pictures import patches
from evit_jax.runtime.parallel import DataParallel
from evit_jax.storage import read, write_whole

MAX_PANELS = 6  # of reducing blocks; the figures on standard output are of all


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--model", required=True, metavar="NAME", help="such as deit_tiny_patch16_224")
    add("--weights", metavar="FILE", help=".safetensors, .pth or .npz, or hf:OWNER/REPO@COMMIT")
    add("--keep_rate", type=float, help="fraction of the patches kept by each reducing block")
    add("--reducer", default="evit", help="evit (default), evit:fuse=False, tome:r=13, ...")
    add("--image_size", help="another size in pixels than the model's: 224, or 224,320 (H,W)")
    add("--classes", type=Path, metavar="FILE", help="JSON list of names, in class order")
    add("--out", type=Path, required=True, metavar="FILE.png")
    add("images", nargs="+", type=Path, metavar="IMAGE")
    options = parser.parse_args(arguments)
    if not options.weights:
        raise InputError(
            "--weights=FILE is needed: what a freshly drawn model attends to means nothing"
        )
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


def parse_size(text: str | None) -> tuple[int, ...] | None:
    """ "224" or "224,320", height first; the model checks them."""
    try:
        return tuple(int(side) for side in text.split(",")) if text else None
    except ValueError:
        raise InputError(f"--image_size must be like 224 or 224,320, got {text}") from None


def read_classes(path: Path | None) -> list[str] | None:
    """The class names in a JSON file."""
    if path is None:
        return None
    content = read(path)
    try:
        names = json.loads(content)
    except ValueError:
        names = None
    if not isinstance(names, list) or not names or {type(name) for name in names} != {str}:
        raise InputError(f"--classes={path} must hold a JSON list of names, in class order")
    return names


def compile_look(model, card):
    """(params, uint8 image (1, H, W, 3)) -> all that is drawn and said of one image."""
    dense = model.clone(keep=())
    first = next(block for block, keep in enumerate(model.keep) if keep is not None)

    def look(params, images):
        images = card.normalise(images)
        dense_logits, _ = dense.apply({"params": params}, images)
        logits, out = model.apply({"params": params}, images)
        return dict(
            dense=jax.nn.softmax(dense_logits[0]),
            reduced=jax.nn.softmax(logits[0]),
            # The first reducing block still sees every patch, and this is what it decides by.
            attention=out["cls_attention"][first][0, model.prefix :],
            owners=[owner[0] for owner in out["owner"]],
        )

    return DataParallel(jax.devices()[:1]).compile_eval(look)


def figures(seen: dict, path: Path, classes: list[str] | None) -> dict:
    """The numbers of one image for standard output."""
    row = dict(image=str(path))
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
    said = (
        f"{variant}: {row[variant]['class']}  {row[variant]['probability']:.1%}"
        for variant in ("dense", "reduced")
    )
    return patches.Row(panels, labels, "  |  ".join(said))


def write_png(path: Path, image: Image.Image) -> None:
    """A PNG of 256 colours, half the size of one of all, that is never seen half written."""
    content = io.BytesIO()
    colours = image.quantize(256, kmeans=1)
    dither = Image.Dither.FLOYDSTEINBERG  # without it skies have bands
    image.quantize(palette=colours, dither=dither).save(content, "PNG", optimize=True)
    write_whole(path, content.getvalue())


def visualize(options: argparse.Namespace) -> dict:
    """Draws the picture and returns the figures."""
    size, classes = parse_size(options.image_size), read_classes(options.classes)
    settings = dict(keep_rate=options.keep_rate, reducer=options.reducer, image_size=size)
    if classes:
        settings["num_classes"] = len(classes)
    model, params = create_model(options.model, weights=options.weights, **settings)
    blocks = [block for block, keep in enumerate(model.keep) if keep is not None]
    if not blocks:
        raise InputError("no block reduces its tokens; ask for it, as with --keep_rate=0.7")

    card = preprocessing(options.model)
    crop = dict(size=model.image_size, crop=card.crop, interpolation=card.interpolation)
    views = [centre_crop(decode(read(path), str(path)), **crop) for path in options.images]
    look = compile_look(model, card)
    rows, images = [], []
    for number, (path, view) in enumerate(zip(options.images, views, strict=True), start=1):
        print(f"image {number}/{len(views)}: {path}", file=sys.stderr)
        seen = jax.device_get(look(params, np.asarray(view)[None]))
        images.append(figures(seen, path, classes))
        rows.append(draw_row(view, seen, images[-1], model, blocks))

    title = [options.model, f"reducer {options.reducer}"]
    if options.keep_rate is not None:
        title.append(f"keep rate {options.keep_rate:g}")
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
