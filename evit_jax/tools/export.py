# SPDX-License-Identifier: Apache-2.0
"""A model as files that run elsewhere: StableHLO, ONNX, SavedModel, each checked against Flax.

python -m evit_jax.tools.export --model=deit_tiny_patch16_224 --weights=FILE --out=FOLDER \\
    [--keep_rate=0.7 | --macs=0.63e9 | --share=0.5 | --plan=FILE] [--reducer=evit] \\
    [--formats=stablehlo,onnx,savedmodel] [--batch=any | 8] [--platforms=cpu,cuda,tpu]
python -m evit_jax.tools.export --workdir=runs/digits --out=FOLDER
python -m evit_jax.tools.export ... --quantize=int8 --data=FOLDER --classes=FILE.json
python -m evit_jax.tools.export ... --formats=stablehlo,onnx --rounds=10 --time_batch=32

Every file is a function of normalized images (B, height, width, 3) float32 to logits, or to pooled
features of models without a head. FOLDER gets
  model.stablehlo       for jax.export.deserialize(...).call, on all of --platforms
  model.onnx            for onnxruntime
  savedmodel/           for TensorFlow, which has to be installed
  *int8*                with --quantize=int8: weights and activations of linear layers in 8 bits
  preprocessing.json    how pixels become the input; classes; tokens after each block
Each file is loaded again and compared with the model in Flax on batches of 1 and 5 images (of
--batch=N: one of N), those of --images or --data, or random ones. A float32 file that is off by
more than 0.0001 is an error. With --data every file is run over all images and its top-1 printed;
with --images, which need no labels, the fraction with the same first class as in float32 Flax and
the KL divergence to it. --rounds times all files in turns with Flax, on this machine's CPU.

The last line of standard output is a JSON object; `files` has an object for each file.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from evit_jax import cli, tables
from evit_jax.data import pipeline, read_classes
from evit_jax.errors import InputError, check_names
from evit_jax.export import onnx, quantize, savedmodel, stablehlo
from evit_jax.export.sidecar import preprocessing_json
from evit_jax.measure.report import spread
from evit_jax.measure.timing import take_turns
from evit_jax.models import preprocessing
from evit_jax.models.card import Preprocessing
from evit_jax.models.images import preprocess
from evit_jax.plan.flops import macs
from evit_jax.runtime.parallel import DataParallel
from evit_jax.storage import write_whole
from evit_jax.tools.calibrate import draw_images
from evit_jax.tools.evaluate import BATCH_SIZE, open_data
from evit_jax.tools.visualize import class_names
from evit_jax.training.trained import ModelSpec, open_spec

FORMATS = dict(stablehlo=stablehlo, onnx=onnx, savedmodel=savedmodel)
NAMES = dict(stablehlo="model{}.stablehlo", onnx="model{}.onnx", savedmodel="savedmodel{}")
TOLERANCE = 1e-4


class File(NamedTuple):
    """One that was written."""

    format: str
    quantize: str | None
    path: Path
    call: Callable  # images (B, H, W, 3) float32 -> logits, as it was loaded again


def arguments() -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    cli.add_model_flags(parser, "model", "weights", "workdir")
    add("--keep_rate", type=float, help="fraction of the patches kept by each reducing block")
    add("--macs", type=float, help="budget: multiply-accumulates of an image, such as 0.63e9")
    add("--share", type=float, help="budget: share of the dense model's, such as 0.5")
    cli.add_model_flags(parser, "plan", "reducer", "layers", "multiple_of")
    cli.add_model_flags(parser, "image_size", "num_classes")
    add("--out", required=True, type=Path, metavar="FOLDER", help="made where it is not there")
    add("--formats", default="stablehlo", help=f"of {', '.join(FORMATS)}; default stablehlo")
    add("--batch", default="any", help="any (the default), or a number of images")
    add("--platforms", default=",".join(stablehlo.PLATFORMS), help="of stablehlo")
    add("--quantize", choices=("int8",), help="files with 8-bit linear layers besides")
    add("--images", metavar="FOLDER", help="to compare on: with images in it or below")
    add("--data", help="to compare and to take top-1 on: class folders, as for evaluate")
    add("--classes", help="JSON list of folder names in class order")
    add("--rounds", type=int, default=0, help="turns in which images/s are timed; default none")
    add("--time_batch", type=int, default=32, help="images in a timed call, unless --batch says")
    flags = parser.parse_args()
    flags.formats = [name for name in flags.formats.split(",") if name]
    flags.platforms = [name for name in flags.platforms.split(",") if name]
    check_names("format", flags.formats, FORMATS)
    if not flags.formats or not flags.platforms:
        raise InputError("--formats and --platforms each need one name or more")
    if flags.batch != "any" and not (flags.batch.isdecimal() and int(flags.batch)):
        raise InputError(f"--batch must be any, or a number from 1 up, got {flags.batch!r}")
    flags.batch = None if flags.batch == "any" else int(flags.batch)
    plans = ("keep_rate", "macs", "share", "plan")
    given = [f"--{name}" for name in plans if getattr(flags, name) is not None]
    if len(given) > 1:
        raise InputError(f"{' and '.join(given)} each say how much is kept: give one of them")
    if flags.share is not None and not 0 < flags.share <= 1:
        raise InputError(f"--share must be in (0, 1], got {flags.share:g}")
    if flags.images and flags.data:
        raise InputError("--images has no labels and --data has: give one of them")
    if flags.rounds < 0 or flags.time_batch < 1:
        raise InputError("--rounds must be 0 or more, and --time_batch 1 or more")
    for name in flags.formats:
        FORMATS[name].check_installed()
    return flags


def build(flags: argparse.Namespace, spec: ModelSpec):
    """The model with the plan that the flags ask for, computed in float32."""
    budget = flags.macs
    if flags.share is not None:
        budget = flags.share * macs(spec.build(keep_rate=1))
    model = spec.build(keep_rate=flags.keep_rate, macs=budget)
    return model.clone(dtype=jnp.float32, pallas=False)


def write_files(flags: argparse.Namespace, model, params: dict) -> list[File]:
    """Writes all of them and loads them again."""

    def logits(params, images):
        return model.apply({"params": params}, images)[0]

    functions = {None: lambda images: logits(params, images)}
    if flags.quantize:
        small, with_int8 = quantize.quantized(params), quantize.with_int8_products(logits)
        functions["int8"] = lambda images: with_int8(small, images)
    flags.out.mkdir(parents=True, exist_ok=True)
    files = []
    for name in flags.formats:
        more = dict(platforms=flags.platforms) if name == "stablehlo" else {}
        for kind, function in functions.items():
            path = flags.out / NAMES[name].format("" if kind is None else f".{kind}")
            print(f"writing {path} ...", file=sys.stderr)
            if kind and name == "onnx":  # from the file in float32
                onnx.quantize_file(files[-1].path, path)
            else:
                FORMATS[name].write(path, function, model.image_size, batch=flags.batch, **more)
            files.append(File(name, kind, path, FORMATS[name].load(path)))
    return files


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    files = [path] if path.is_file() else path.rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file())


def batches_of(
    flags: argparse.Namespace, spec: ModelSpec, model, card: Preprocessing, source
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray | None]]:
    """Images (B, H, W, 3) float32, which of them count, and their labels or None."""
    size = flags.batch or BATCH_SIZE
    if source is not None:
        view = dict(size=model.image_size, **card.view)
        for batch in pipeline.eval_batches(source, **view, batch_size=size):
            yield np.asarray(card.normalize(batch["image"])), batch["mask"], batch["label"]
    elif flags.images:
        files = draw_images(flags.images, sys.maxsize, 0)
        for start in range(0, len(files), size):
            some = files[start : start + size]
            images = preprocess(spec.name, some, size=model.image_size)
            missing = size - len(some)
            images = np.pad(np.asarray(images), ((0, missing), (0, 0), (0, 0), (0, 0)))
            yield images, np.arange(size) < len(some), None
    else:
        shape = flags.batch or 5, *model.image_size, 3
        images = np.random.default_rng(0).normal(size=shape).astype(np.float32)
        yield images, np.ones(len(images), bool), None


def check(flags: argparse.Namespace, file: File, flax: Callable, images: np.ndarray) -> dict:
    """The largest difference to Flax, for each size of a batch.

    Raises:
      InputError: a float32 file is off.
    """
    sizes = [flags.batch] if flags.batch else [1, 5]
    found = {}
    for size in sizes:
        some = np.resize(images, (size, *images.shape[1:]))
        found[size] = float(np.abs(np.asarray(file.call(some)) - flax(some)).max())
        print(f"{file.path}, batch {size}: off by {found[size]:.2g} at most", file=sys.stderr)
        if file.quantize is None and not found[size] <= TOLERANCE:
            raise InputError(
                f"{file.path} is off by {found[size]:.3g} from the model in Flax, more than "
                f"{TOLERANCE:g}; where two tokens score alike, rounding may decide between them: "
                "compare on real images, --images=FOLDER, or choose another reducer"
            )
    return found


class Tally:
    """What a file's outputs are over many images."""

    def __init__(self):
        self.images = self.right = self.same = 0
        self.kl = 0.0

    def add(self, logits: np.ndarray, wanted: np.ndarray, labels: np.ndarray | None) -> None:
        """Logits (n, C) of a file and of float32 Flax, labels (n,) or None."""
        first, logs, wanted_logs = logits.argmax(1), log_softmax(logits), log_softmax(wanted)
        self.images += len(logits)
        self.same += int((first == wanted.argmax(1)).sum())
        self.right += 0 if labels is None else int((first == labels).sum())
        self.kl += float((np.exp(wanted_logs) * (wanted_logs - logs)).sum())

    def figures(self, labels: bool) -> dict:
        found = dict(agreement=self.same / self.images, kl=self.kl / self.images)
        return (dict(top1=self.right / self.images) if labels else {}) | found


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Logits (n, C) -> logarithms of probabilities, float64."""
    logits = logits.astype(np.float64)
    logits = logits - logits.max(axis=1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def time_files(
    flags: argparse.Namespace, model, files: list[File], flax: Callable
) -> dict[str, dict]:
    """name -> images per second and its range, Flax first, in turns."""
    count = flags.batch or flags.time_batch
    images = np.random.default_rng(0).normal(size=(count, *model.image_size, 3)).astype(np.float32)
    calls = {"flax": lambda: jnp.asarray(flax(images))}
    for file in files:
        calls[file.path.name] = lambda call=file.call: jnp.asarray(call(images))
    with tqdm(total=flags.rounds * len(calls), unit="turn", desc="timing", disable=None) as bar:
        seconds = take_turns(calls, rounds=flags.rounds, after_turn=bar.update)
    return {name: spread("images_per_second", count / spent) for name, spent in seconds.items()}


def main() -> None:
    flags = arguments()
    spec = open_spec(flags)
    model = build(flags, spec)
    card = preprocessing(spec.name)
    source = open_data(flags, spec) if flags.data else None
    if source is not None and len(source.classes) != model.num_classes:
        raise InputError(
            f"the data has {len(source.classes)} classes and the model {model.num_classes}; "
            "--classes=FILE, a JSON list of all of the model's, says which folder is which"
        )
    classes = source.classes if source is not None else None
    if classes is None and flags.classes:
        classes = read_classes(flags.classes, unique=False)
    classes = classes or class_names(spec, model.num_classes)
    params = spec.load_params(model)
    program = DataParallel(jax.devices()[:1]).compile_eval(
        lambda params, images: model.apply({"params": params}, images)[0]
    )

    def flax(images: np.ndarray) -> np.ndarray:
        return np.asarray(program(params, images))

    files = write_files(flags, model, params)
    write_whole(
        flags.out / "preprocessing.json", preprocessing_json(spec.label, model, card, classes)
    )
    differences, tallies, float32 = [], [Tally() for _ in files], Tally()
    many = source is not None or flags.images
    with tqdm(unit="batch", desc="images", disable=None if many else True) as bar:
        for images, mask, labels in batches_of(flags, spec, model, card, source):
            differences = differences or [check(flags, file, flax, images) for file in files]
            if many:
                labels = None if labels is None else labels[mask]
                wanted = flax(images)[mask]
                float32.add(wanted, wanted, labels)
                for file, tally in zip(files, tallies, strict=True):
                    tally.add(np.asarray(file.call(images))[mask], wanted, labels)
            bar.update()
    speeds = time_files(flags, model, files, flax) if flags.rounds else {}

    rows, labeled = [], source is not None
    for file, off, tally in zip(files, differences, tallies, strict=True):
        row = dict(format=file.format, quantize=file.quantize, path=str(file.path))
        row |= dict(bytes=size_of(file.path), differences=off)
        if many and model.num_classes:
            row |= tally.figures(labeled)
        if file.format == "onnx":
            first = model.hidden * (2 if model.mlp == "swiglu_packed" else 1)
            row["tokens_in_graph"] = onnx.tokens_after_blocks(file.path, model.width, first)
        rows.append(row | speeds.get(file.path.name, {}))
    own = float32.figures(labeled) if many and model.num_classes else {}
    own |= speeds.get("flax", {})
    print(report(rows, own), file=sys.stderr)
    answer = dict(
        model=spec.label,
        out=str(flags.out),
        tokens=model.tokens_per_block,
        macs=macs(model),
        images=float32.images,
        flax=own,
        files=rows,
    )
    print(json.dumps(answer))


def report(rows: list[dict], own: dict) -> str:
    """A line for Flax and for each file."""
    columns = dict(
        MiB=lambda row: f"{row['bytes'] / 2**20:.1f}",
        off=lambda row: f"{max(row['differences'].values()):.1e}",
        top1=lambda row: f"{row['top1']:.2%}",
        agreement=lambda row: f"{row['agreement']:.2%}",
        kl=lambda row: f"{row['kl']:.2g}",
        images_per_second=lambda row: "{:,.1f} ({:,.1f} to {:,.1f})".format(
            row["images_per_second"], *row["images_per_second_range"]
        ),
    )
    keys = dict(MiB="bytes", off="differences")
    everything = [dict(path="float32 in Flax") | own, *rows]
    shown = {
        name: cell
        for name, cell in columns.items()
        if any(keys.get(name, name) in row for row in everything)
    }
    lines = [["", *(name.replace("_per_", "/") for name in shown)]]
    for row in everything:
        cells = (cell(row) if keys.get(name, name) in row else "" for name, cell in shown.items())
        lines.append([row["path"], *cells])
    return tables.table(lines)


if __name__ == "__main__":
    cli.guard(main)
