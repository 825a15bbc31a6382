# SPDX-License-Identifier: Apache-2.0
"""Accuracy and speed of one set of weights at several keep rates, over one pass of decoding.

python -m evit_jax.tools.evaluate --model=deit_tiny_patch16_224 --weights=FILE --data=FOLDER \\
    [--classes=FILE.json] [--keep_rate=1,0.7] [--reducer=evit | evit:fuse=False | tome:r=13] \\
    [--layers=3,6,9] [--multiple_of=1,8]
python -m evit_jax.tools.evaluate --model=vit_small_patch14_dinov2 --weights=FILE --data=FOLDER \\
    --knn=LABELED_FOLDER [--neighbors=20] [--temperature=0.07]
python -m evit_jax.tools.evaluate --workdir=runs/digits      what a training run left, dense and as
                                                             trained, on the run's own test images

The standard protocol: shorter side to size / crop, center crop, mean and std as the model's card
says. FOLDER holds class folders, or val/ (or test/) with class folders, or a TFDS set prepared as
ArrayRecord. Labels are the sorted folder names, or their places in --classes. With --workdir the
flags override what the run was trained with: --data, --keep_rate, --reducer, --layers, ...
--knn is for models without a head: an image's class is what the most similar images of another
folder vote for, by the cosine of the pooled features, with weight exp(cosine / temperature) (DINO's
protocol). Its images go through the same variant as the test images; `loss` is that of the votes.

The last line of standard output is a JSON object with a list `results`, an object per variant.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from tqdm import tqdm

from evit_jax import cli, tables
from evit_jax.data import open_source, pipeline
from evit_jax.errors import InputError
from evit_jax.measure.neighbors import NearestNeighbors, encode
from evit_jax.models import preprocessing
from evit_jax.runtime.parallel import DataParallel
from evit_jax.spec import numbers
from evit_jax.training import steps
from evit_jax.training.evaluation import run_through
from evit_jax.training.trained import ModelSpec, open_spec, open_test_data, reduces

BATCH_SIZE = 50


def arguments() -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    cli.add_model_flags(parser, "model", "weights", "workdir")
    add("--data", help="folder of class folders, its parent, or a TFDS set; default the run's")
    add("--classes", help="JSON list of folder names in class order")
    add("--knn", metavar="FOLDER", help="labeled images whose nearest neighbors classify --data's")
    add("--neighbors", type=int, default=20, help="of those, how many vote")
    add("--temperature", type=float, default=0.07, help="of their votes")
    add("--keep_rate", default="", help="one or several, such as 1,0.7; default the reducer's own")
    cli.add_model_flags(parser, "plan", "reducer", "layers", "multiple_of")
    cli.add_model_flags(parser, "image_size", "num_classes", "dtype")
    add("--batch_size", type=int, help="images at a time, over all devices; default 50 or more")
    add("--crop", type=float, help="fraction of the resized shorter side; default the model's card")
    add("--interpolation", help="bicubic, bilinear, lanczos or nearest; default the model's card")
    add("--threads", type=int, default=0, help="decoding threads; 0 is one per processor")
    flags = parser.parse_args()
    if flags.threads < 0:
        raise InputError(f"--threads must be 0 or more, got {flags.threads}")
    if flags.neighbors < 1 or not flags.temperature > 0:
        raise InputError("--neighbors must be 1 or more and --temperature more than 0")
    return flags


def open_data(flags: argparse.Namespace, spec: ModelSpec, classes=None):
    """The images of --data, else of the run, with labels in the order of these class names.

    Args:
      classes: None for those of --classes, or of the run.
    """
    if flags.data:
        known = flags.classes or (spec.config and spec.config["data"]["classes"])
        return open_folder(flags, flags.data, "test", classes or known)
    if spec.config is None:
        raise InputError("--data=FOLDER is needed: class folders, their parent, or a TFDS set")
    return open_test_data(spec.config, classes=flags.classes)


def open_labeled(flags: argparse.Namespace):
    """The images of --knn: those in train/, or of the class folders."""
    folder = Path(flags.knn).expanduser()
    train = (folder / "train").is_dir() or is_tfds(folder)
    return open_folder(flags, flags.knn, "train" if train else "test", flags.classes)


def open_folder(flags: argparse.Namespace, path: str, split: str, classes):
    """A folder of class folders, or a TFDS set, which brings its own classes."""
    folder = Path(path).expanduser()
    if is_tfds(folder):
        return open_source("tfds", split, str(folder), classes=flags.classes)
    return open_source("folder", split, str(folder), classes=classes)


def is_tfds(folder: Path) -> bool:
    """Whether a folder holds a set prepared by tensorflow-datasets."""
    return folder.is_dir() and any(folder.glob("**/dataset_info.json"))


def default_rates(spec: ModelSpec) -> tuple[float | None, ...]:
    """The reducer's own schedule; of a run the dense model and all that it was trained at."""
    if spec.config is None:
        return (None,)
    if spec.keep_rate is None:
        return (1.0, None) if reduces(spec.build()) else (1.0,)
    return tuple(sorted({1.0, spec.keep_rate, *spec.config.get("sandwich", ())}, reverse=True))


def main() -> None:
    flags = arguments()
    spec = open_spec(flags, several=True)
    card = preprocessing(spec.name)
    changes = dict(crop=flags.crop, interpolation=flags.interpolation)
    card = dataclasses.replace(card, **{k: v for k, v in changes.items() if v is not None})
    devices = DataParallel()
    count = jax.device_count()
    batch_size = flags.batch_size or -(-BATCH_SIZE // count) * count
    devices.check_batch_size("--batch_size", batch_size)
    rates = numbers(flags.keep_rate, float) or default_rates(spec)
    multiples = numbers(flags.multiple_of or "", int) or (spec.multiple_of,)
    requests = list(itertools.product(rates, multiples))
    variants = [spec.build(keep_rate=rate, multiple_of=multiple) for rate, multiple in requests]
    # A reducer that learns has parameters in blocks that reduce alone.
    model = max(variants, key=lambda variant: sum(entry is not None for entry in variant.kept))

    labeled = open_labeled(flags) if flags.knn else None
    source = open_data(flags, spec, labeled and labeled.classes)
    trained_on = {} if flags.data or spec.config is None else spec.config["data"]
    if len(source.classes) != model.num_classes and not (trained_on or labeled):
        raise InputError(  # training takes fewer as well
            f"the data has {len(source.classes)} classes and the model {model.num_classes}; "
            "--classes=FILE, a JSON list of all of the model's, says which folder is which"
        )

    if labeled and tuple(source.classes) != tuple(labeled.classes):
        raise InputError(
            f"{flags.knn} has {len(labeled.classes)} classes and the test images "
            f"{len(source.classes)}, and not the same ones: they have to be for --knn"
        )

    def batches_of(source):
        return pipeline.eval_batches(
            source,
            size=model.image_size,
            **card.view,
            batch_size=batch_size,
            host=jax.process_index(),
            hosts=jax.process_count(),
            threads=flags.threads,
            damaged=trained_on.get("damaged", "stop"),
        )

    params = devices.init(dict, spec.load_params(model))
    inputs = [params] * len(variants)
    classifiers = variants
    if labeled:
        headless = [variant.clone(num_classes=0) for variant in variants]
        with tqdm(total=-(-len(labeled) // batch_size), unit="batch", disable=None) as bar:
            bar.set_postfix_str("encoding --knn")
            banks, labels = encode(
                headless, params, batches_of(labeled), devices, card, see=lambda _: bar.update()
            )
        about = len(labeled.classes), flags.neighbors, flags.temperature
        classifiers = [NearestNeighbors(model, *about) for model in headless]
        inputs = [
            devices.init(dict, dict(model=params, bank=bank, labels=labels)) for bank in banks
        ]
    programs = [
        devices.compile_eval(functools.partial(steps.eval_step, model=one, preprocessing=card))
        for one in classifiers
    ]

    seconds = [[] for _ in variants]

    def timed(number: int, batch: dict) -> dict:
        if not seconds[number]:  # compiles and warms up
            jax.block_until_ready(programs[number](inputs[number], batch))
        start = time.perf_counter()
        sums = jax.block_until_ready(programs[number](inputs[number], batch))
        seconds[number].append(time.perf_counter() - start)
        return sums

    total = -(-len(source) // batch_size)
    damaged = []
    with tqdm(total=total, unit="batch", disable=None) as bar:

        def see(host: dict) -> None:
            for number in host["index"][host["damaged"]].tolist():
                damaged.append(number)
                tqdm.write(f"skipped damaged image: {source[number]['name']}", file=sys.stderr)
            bar.update()

        timed_programs = {i: functools.partial(timed, i) for i in range(len(variants))}
        means = run_through(batches_of(source), timed_programs, devices, see=see)

    layers = numbers(flags.layers or "", int) or None  # None: the reducer's, or the run's, own
    results = []
    shown = [["keep rate", "multiple of", "tokens", "top-1", "top-5", "loss", "images/s"]]
    for number, (rate, multiple_of) in enumerate(requests):
        variant, scores = variants[number], means[number]
        speed = total * batch_size / sum(seconds[number])  # padding is computed too
        results.append(
            dict(
                keep_rate=rate,
                reducer=spec.reducer,
                layers=layers,
                multiple_of=multiple_of,
                top1=scores["test_top1"],
                top5=scores["test_top5"],
                loss=scores["test_loss"],
                images=len(source) - len(damaged),
                images_per_second=speed,
                tokens=variant.tokens_per_block,
            )
        )
        shown.append(
            [
                spec.reducer if rate is None else f"{rate:g}",
                f"{multiple_of}",
                tables.runs(variant.tokens_per_block),
                f"{100 * scores['test_top1']:.2f} %",
                f"{100 * scores['test_top5']:.2f} %",
                f"{scores['test_loss']:.4f}",
                f"{speed:,.0f}",
            ]
        )
    print(tables.table(shown), file=sys.stderr)
    print(json.dumps(dict(model=spec.label, dtype=jnp.dtype(model.dtype).name, results=results)))


if __name__ == "__main__":
    cli.guard(main)
