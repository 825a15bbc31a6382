# SPDX-License-Identifier: Apache-2.0
"""Images per second of the input pipeline, beside a plain Pillow loop that makes the same images.

python -m evit_jax.tools.benchmark_input --data=FOLDER [--images=512] [--size=224] [--magnitude=9]

Reading, decoding, random resized crop, flip and RandAugment, into batches. FOLDER holds class
folders, or train/ or val/ with class folders. In every round the variants take turns: the loop, the
pipeline with one thread, with a thread per core, and with a worker process per core.
The last line of standard output is a JSON object: `results` has an object per variant; `ratio` is
that of one thread to the loop, both on a core; `scaling` those of all cores to one thread.
"""

import argparse
import contextlib
import functools
import io
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from evit_jax import cli, tables
from evit_jax.data import open_source
from evit_jax.data.augment import random_box
from evit_jax.data.loader import processors
from evit_jax.data.order import Order
from evit_jax.data.pipeline import train_batches
from evit_jax.data.randaugment import rand_augment
from evit_jax.errors import InputError

CROP = dict(scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3))
WARP = dict(interpolation="bicubic", fill=(124, 116, 104))


def arguments() -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--data", required=True, help="folder of class folders, or its parent")
    add("--images", type=int, default=512, help="to time per core, in each round")
    add("--size", type=int, default=224, help="of the crops")
    add("--batch_size", type=int, default=32, help="images in a batch")
    add("--magnitude", type=float, default=9, help="of RandAugment; 0 leaves it out")
    add("--rounds", type=int, default=5, help="in which each variant is timed once")
    flags = parser.parse_args()
    for name in ("images", "size", "batch_size", "rounds"):
        if getattr(flags, name) < 1:
            raise InputError(f"--{name} must be 1 or more, got {getattr(flags, name)}")
    return flags


def plain_batches(
    source, *, size: int, batch_size: int, magnitude: float, count: int
) -> Iterator[np.ndarray]:
    """What the pipeline shows, in a loop without it: (batch_size, size, size, 3) uint8 each."""
    order = Order(len(source), seed=0, batch_size=batch_size)
    places = range(count * batch_size)
    drawn = [(order[place], order.generator(place)) for place in places]  # not part of the loop
    for first in places[::batch_size]:
        images = []
        for index, rng in drawn[first : first + batch_size]:
            image = Image.open(io.BytesIO(source[index]["image"])).convert("RGB")
            box = random_box(*image.size, rng, **CROP)
            image = image.crop(box).resize((size, size), Image.Resampling.BICUBIC)
            if rng.random() < 0.5:
                image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            if magnitude:
                image = rand_augment(image, rng, magnitude=magnitude, std=0.5, layers=2, **WARP)
            images.append(np.asarray(image))
        yield np.stack(images)


def pipeline_batches(
    source, *, size: int, batch_size: int, magnitude: float, threads: int, workers: int = 0
) -> Iterator[dict[str, np.ndarray]]:
    """The same images by the pipeline."""
    return train_batches(
        source,
        size=(size, size),
        flip=True,
        randaugment_magnitude=magnitude,
        randaugment_std=0.5,
        randaugment_layers=2,
        color_jitter=0,
        repeats=1,
        seed=0,
        batch_size=batch_size,
        threads=threads,
        workers=workers,
        **CROP,
        **WARP,
    )


def images_per_second(batches: Iterator, *, batch_size: int, images: int, cores: int = 1) -> float:
    """The speed at which batches come, of which `cores` are made side by side.

    Those are ready at about the same time, so whole rows of them are timed, after two to warm up.
    """
    count = cores * -(-images // batch_size)
    with contextlib.closing(batches):
        for _ in range(2 * cores):
            next(batches)
        start = time.perf_counter()
        for _ in range(count):
            next(batches)
        return count * batch_size / (time.perf_counter() - start)


def main() -> None:
    flags = arguments()
    folder = Path(flags.data).expanduser()
    source = open_source("folder", "train" if (folder / "train").is_dir() else "test", str(folder))
    cores = processors()
    settings = dict(size=flags.size, batch_size=flags.batch_size, magnitude=flags.magnitude)
    count = 2 + -(-flags.images // flags.batch_size)
    plain = functools.partial(plain_batches, source, count=count, **settings)
    pipeline = functools.partial(pipeline_batches, source, **settings)
    variants = {
        "plain loop": (plain, 1),
        "1 thread": (functools.partial(pipeline, threads=1), 1),
        f"{cores} threads": (functools.partial(pipeline, threads=cores), cores),
        f"{cores} workers": (functools.partial(pipeline, threads=1, workers=cores), cores),
    }
    speeds = {name: [] for name in variants}
    turns = [name for _ in range(flags.rounds) for name in variants]
    for name in tqdm(turns, unit="turn", disable=None):
        start, busy = variants[name]
        amount = dict(batch_size=flags.batch_size, images=flags.images, cores=busy)
        speeds[name].append(images_per_second(start(), **amount))

    def figures(values: np.ndarray) -> dict[str, float]:
        return dict(median=np.median(values), lowest=values.min(), highest=values.max())

    speeds = {name: np.asarray(values) for name, values in speeds.items()}
    loop, thread, threads, workers = speeds.values()
    results = {name: figures(values) for name, values in speeds.items()}
    shown = [["variant", "images/s", "range"]]
    for name, row in results.items():
        shown.append([name, f"{row['median']:,.0f}", f"{row['lowest']:,.0f}-{row['highest']:,.0f}"])
    print(tables.table(shown), file=sys.stderr)
    ratio = figures(thread / loop)
    scaling = dict(threads=figures(threads / thread), workers=figures(workers / thread))
    print(json.dumps(dict(cores=cores, **settings, results=results, ratio=ratio, scaling=scaling)))


if __name__ == "__main__":
    cli.guard(main)
