# SPDX-License-Identifier: Apache-2.0
"""Accuracy and speed of one set of weights at several keep rates, over one pass of decoding.

python -m evit_jax.tools.evaluate --model=deit_tiny_patch16_224 --weights=FILE --data=FOLDER \\
    [--classes=FILE.json] [--keep_rate=1,0.7] [--reducer=evit | evit:fuse=False | tome:r=13] \\
    [--multiple_of=1,8]

The standard protocol: shorter side to size / crop, centre crop, mean and std as the model's card
says. FOLDER holds class folders, or val/ (or test/) with class folders, or a TFDS set prepared as
ArrayRecord. Labels are the sorted folder names, or their places in --classes.
The last line of standard output is a JSON object with a list `results`, an object per variant.
"""

import argparse
import contextlib
import dataclasses
import functools
import itertools
import json
import sys
import time
from pathlib import Path

import jax
from tqdm import tqdm

from evit_jax import cli, tables
from evit_jax.data import open_source, pipeline
from evit_jax.errors import InputError
from evit_jax.models import create_model, preprocessing
from evit_jax.runtime.parallel import DataParallel
from evit_jax.spec import numbers
from evit_jax.training import metrics, steps


def arguments() -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--model", required=True, help="name, as for create_model")
    add("--weights", required=True, help="file, or hf:OWNER/REPOSITORY@COMMIT")
    add("--data", required=True, help="folder of class folders, its parent, or a TFDS set")
    add("--classes", help="JSON list of folder names in class order")
    add("--keep_rate", default="", help="one or several, such as 1,0.7; default the reducer's own")
    add("--layers", default="", help="reducing blocks, such as 3,6,9; default the reducer's own")
    add("--multiple_of", default="1", help="one or several: tokens rounded up to multiples of it")
    add("--reducer", default="evit", help="evit, evit:fuse=False, random, tome:r=13, ...")
    add("--batch_size", type=int, default=50, help="images at a time, over all devices")
    add("--dtype", default="float32", help="of the computation: float32 or bfloat16")
    add("--num_classes", type=int, help="of a model with another number than its name says")
    add("--image_size", default="", help="224 or 224,320; default the model's own")
    add("--crop", type=float, help="fraction of the resized shorter side; default the model's card")
    add("--interpolation", help="bicubic, bilinear, lanczos or nearest; default the model's card")
    add("--threads", type=int, default=0, help="that decode; 0 is one per processor")
    flags = parser.parse_args()
    if flags.threads < 0:
        raise InputError(f"--threads must be 0 or more, got {flags.threads}")
    return flags


def open_data(flags: argparse.Namespace):
    """The images, with labels in the order of the model's classes."""
    folder = Path(flags.data).expanduser()
    prepared = folder.is_dir() and any(folder.glob("**/dataset_info.json"))
    name = "tfds" if prepared else "folder"
    return open_source(name, "test", str(folder), classes=flags.classes)


def main() -> None:
    flags = arguments()
    card = preprocessing(flags.model)
    changes = dict(crop=flags.crop, interpolation=flags.interpolation)
    card = dataclasses.replace(card, **{k: v for k, v in changes.items() if v is not None})
    devices = DataParallel()
    devices.check_batch_size("--batch_size", flags.batch_size)
    rates = numbers(flags.keep_rate, float) or (None,)
    requests = list(itertools.product(rates, numbers(flags.multiple_of, int) or (1,)))
    layers = numbers(flags.layers, int) or None

    source = open_data(flags)
    model, params = create_model(
        flags.model,
        weights=flags.weights,
        reducer=flags.reducer,
        dtype=flags.dtype,
        num_classes=flags.num_classes,
        image_size=numbers(flags.image_size, int) or None,
    )
    if len(source.classes) != model.num_classes:
        raise InputError(
            f"the data has {len(source.classes)} classes and the model {model.num_classes}; "
            "--classes=FILE, a JSON list of all of the model's, says which folder is which"
        )
    params = devices.init(dict, params)
    plans = [
        model.plan(keep_rate=rate, layers=layers, multiple_of=multiple_of)
        for rate, multiple_of in requests
    ]
    variants = [model.clone(keep=plan) for plan in plans]
    programs = [
        devices.compile_eval(functools.partial(steps.eval_step, model=variant, preprocessing=card))
        for variant in variants
    ]

    sums, seconds = [[] for _ in variants], [0.0 for _ in variants]
    batches = pipeline.eval_batches(
        source,
        size=model.image_size,
        crop=card.crop,
        interpolation=card.interpolation,
        batch_size=flags.batch_size,
        host=jax.process_index(),
        hosts=jax.process_count(),
        threads=flags.threads,
    )
    total = -(-len(source) // flags.batch_size)
    with contextlib.closing(batches):
        for number, batch in enumerate(tqdm(batches, total=total, unit="batch", disable=None)):
            batch = devices.put(batch)
            for i, program in enumerate(programs):
                if number == 0:  # compiles and warms up
                    jax.block_until_ready(program(params, batch))
                start = time.perf_counter()
                sums[i].append(jax.block_until_ready(program(params, batch)))
                seconds[i] += time.perf_counter() - start

    results = []
    shown = [["keep rate", "multiple of", "tokens", "top-1", "top-5", "loss", "images/s"]]
    for request, variant, totals, spent in zip(requests, variants, sums, seconds, strict=True):
        rate, multiple_of = request
        means = metrics.means(totals, "test")
        speed = total * flags.batch_size / spent  # padding is computed too
        results.append(
            dict(
                keep_rate=rate,
                multiple_of=multiple_of,
                reducer=flags.reducer,
                top1=means["test_top1"],
                top5=means["test_top5"],
                loss=means["test_loss"],
                images=len(source),
                images_per_second=speed,
                tokens=variant.tokens_per_block,
            )
        )
        shown.append(
            [
                flags.reducer if rate is None else f"{rate:g}",
                f"{multiple_of}",
                tables.runs(variant.tokens_per_block),
                f"{100 * means['test_top1']:.2f} %",
                f"{100 * means['test_top5']:.2f} %",
                f"{means['test_loss']:.4f}",
                f"{speed:,.0f}",
            ]
        )
    print(tables.table(shown), file=sys.stderr)
    print(json.dumps(dict(model=flags.model, dtype=flags.dtype, results=results)))


if __name__ == "__main__":
    cli.guard(main)
