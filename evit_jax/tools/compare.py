# SPDX-License-Identifier: Apache-2.0
"""Reduction methods beside each other: what each does to a model's outputs within a budget.

python -m evit_jax.tools.compare --model=deit_tiny_patch16_224 --weights=FILE --data=FOLDER \\
    [--classes=FILE.json] [--methods=evit,tome,ward] [--macs=0.5e9,0.63e9 | --shares=0.4,0.5] \\
    [--plans=own,constant] [--plan_files=FILE.json,FILE.json] [--rounds=5] [--out=FILE.png]
python -m evit_jax.tools.compare --workdir=runs/digits --shares=0.4,0.5,0.6

Every method runs at every budget by every plan, on the same weights and images, which are decoded
once. Methods are reducers as in evaluate, with commas between them, or semicolons; by default all
that can meet a budget. --macs are multiply-accumulates of one image, --shares those as shares of
the dense model's; both are upper bounds, and `macs` has what a variant costs. Plans:
  own        what the method makes of a budget by itself
  constant   one keep rate for all its layers
A plan file holds a JSON object with `reducer` and `tokens`, the counts that build_model takes; its
plan is in the smallest budget that holds it. A row's `keep` is what to write there as `tokens`;
its `tokens` are those after each block, prefix included.

Images are read as evaluate reads them. Without labels (a folder of images without class folders,
classes that are not the model's, --labels=no) top-1 is left out; the rest needs none:
  agreement  fraction of the images with the same first class as in the dense model
  kl         mean of KL(dense || reduced) over images, in nats
  kl_error   its standard error; NAME_error is that of NAME
  won, lost  images that only the reduced model, or only the dense one, has right
  top1_error standard error of the difference in top-1 to the dense model, on the same images
  images_per_second   median of --rounds turns on the first batch; speedup is over the dense model
                      in the same round; 24 models take turns at a time
  on_frontier         no variant that costs as little, up to 1 %, has a lower kl
The last line of standard output is a JSON object: `results` has the dense model and an object for
each method, plan and budget, `refused` those that could not be, with the reason. Equal plans are
evaluated once. --out draws top-1, or agreement, and kl against multiply-accumulates.
"""

import argparse
import dataclasses
import functools
import io
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from evit_jax import cli
from evit_jax.data import pipeline
from evit_jax.data.unlabeled import Unlabeled, without_classes
from evit_jax.errors import InputError, check_name
from evit_jax.measure import agreement, agreement_report
from evit_jax.measure.agreement import DENSE
from evit_jax.measure.candidates import PLANS, Candidate, candidates, dense_twin
from evit_jax.measure.report import machine, spread
from evit_jax.measure.timing import take_turns
from evit_jax.models import init_params, preprocessing
from evit_jax.models.card import Preprocessing
from evit_jax.plan.flops import macs
from evit_jax.runtime.parallel import DataParallel
from evit_jax.spec import numbers, split_specs
from evit_jax.storage import write_whole
from evit_jax.tools.evaluate import BATCH_SIZE, open_data
from evit_jax.training.trained import ModelSpec, open_spec

# Programs in memory at a time: Linux gives a process 65,530 mappings, and on a CPU each program
# takes some hundreds of them.
AT_A_TIME = 24


def arguments() -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    cli.add_model_flags(parser, "model", "weights", "workdir")
    add("--data", help="folder of class folders, its parent, a TFDS set or a folder of images")
    add("--classes", help="JSON list of folder names in class order")
    add("--labels", default="auto", help="auto (the default): as far as there are; or no")
    add("--methods", default="", help="such as evit,tome,ward; default all that meet a budget")
    add("--macs", default="", help="budgets: multiply-accumulates of an image, such as 0.63e9")
    add("--shares", default="", help="budgets: shares of the dense model's; default 0.5")
    add("--plans", default=",".join(PLANS), help="own, constant or, the default, both")
    add("--plan_files", default="", help="JSON files with `reducer` and `tokens`")
    cli.add_model_flags(parser, "layers", "image_size", "num_classes", "dtype")
    add("--batch_size", type=int, help="images at a time, over all devices; default 50 or more")
    add("--crop", type=float, help="fraction of the resized shorter side; default the model's card")
    add("--interpolation", help="bicubic, bilinear, lanczos or nearest; default the model's card")
    add("--threads", type=int, default=0, help="decoding threads; 0 is one per processor")
    add("--rounds", type=int, default=5, help="turns in which images/s are timed; 0: none")
    add("--out", metavar="FILE.png", help="the picture")
    flags = parser.parse_args()
    if min(flags.threads, flags.rounds) < 0:
        raise InputError("--threads and --rounds must be 0 or more")
    check_name("value of --labels", flags.labels, ("auto", "no"))
    if flags.out and not (Path(flags.out).suffix == ".png" and Path(flags.out).parent.is_dir()):
        raise InputError(f"--out must be a .png file in a folder that exists, got {flags.out}")
    return flags


def words(text: str) -> list[str]:
    """Specs with semicolons, or else commas, between them, each once."""
    parts = text.split(";") if ";" in text else split_specs(text)
    return list(dict.fromkeys(part.strip() for part in parts if part.strip()))


def budgets_of(flags: argparse.Namespace, dense) -> list[float]:
    """Multiply-accumulates of one image, ascending; half the dense model's where none is asked.

    Raises:
      InputError: one that is none.
    """
    budgets, shares = numbers(flags.macs, float), numbers(flags.shares, float)
    if not (budgets or shares or flags.plan_files):
        shares = (0.5,)
    if not all(0 < share <= 1 for share in shares):
        raise InputError(f"--shares must be in (0, 1] each, got {flags.shares}")
    if not all(0 < budget < float("inf") for budget in budgets):
        raise InputError(f"--macs must be more than 0 each, such as 0.63e9, got {flags.macs}")
    return sorted({*budgets, *(share * macs(dense) for share in shares)})


def open_images(flags: argparse.Namespace, spec: ModelSpec, classes: int):
    """(the images, why their labels cannot be used or "").

    Args:
      classes: the model's.
    """
    folder = Path(flags.data or "").expanduser()
    if flags.data and without_classes(folder):
        return Unlabeled(folder), f"{folder} has no class folders"
    source = open_data(flags, spec)
    if flags.labels == "no":
        return source, "--labels=no"
    own = spec.config is not None and not flags.data  # training takes fewer classes as well
    if len(source.classes) != classes and not own:
        return source, (
            f"the data has {len(source.classes)} classes and the model {classes}; --classes=FILE, "
            "a JSON list of all of the model's, says which folder is which"
        )
    return source, ""


def load_params(spec: ModelSpec, model, shared: dict, devices: DataParallel) -> dict:
    """The weights for a candidate, which are the dense model's unless its reducer has some.

    Raises:
      InputError: its reducer has some, and the file or the run does not.
    """
    if not isinstance(model.reducer, nn.Module):
        return shared
    params, drawn = spec.load_params(model), init_params(model, jax.random.key(0))
    same = jax.tree.map(lambda a, b: bool(np.array_equal(a, b)), params, drawn)
    own = [
        equal
        for path, equal in jax.tree_util.tree_leaves_with_path(same)
        if any(key.key == "reduction" for key in path)
    ]
    if own and all(own):
        raise InputError(
            "it has parameters of its own and the weights have none for it: random ones would show "
            "nothing; train it first, and give --workdir"
        )
    return devices.init(dict, params)


def compile_some(
    spec: ModelSpec,
    dense,
    models: Sequence,
    names: dict,
    card: Preprocessing,
    batch: dict,
    devices: DataParallel,
    done: Callable[[str], object],
) -> tuple[dict[str, Callable], dict]:
    """Compiles the dense model and these models, one after the other.

    Args:
      names: model -> name.
      batch: of the shapes and dtypes of all batches, on the devices.
      done: is handed each name in turn.

    Returns:
      (name -> program of a batch, `DENSE` first; model -> the error that it was refused with).
    """

    def program(model, params: dict, batch: dict):
        step = functools.partial(agreement.step, model=model, preprocessing=card)
        compiled = functools.partial(devices.compile_eval(step), params)
        return compiled, jax.block_until_ready(compiled(batch))

    shared = devices.init(dict, spec.load_params(dense))
    programs, reasons = {}, {}
    programs[DENSE], result = program(dense, shared, batch)
    batch = batch | dict(dense=result["logits"])
    for model in models:
        try:
            params = load_params(spec, model, shared, devices)
            programs[names[model]], _ = program(model, params, batch)
        except InputError as error:
            reasons[model] = error
        done(names[model])
    return programs, reasons


def turns(
    programs: dict[str, Callable], batch: dict, rounds: int
) -> dict[str, dict[str, float | list[float]]]:
    """name -> images per second and speed-up of each program, on one batch in turns."""
    calls = {name: functools.partial(program, batch) for name, program in programs.items()}
    with tqdm(total=rounds * len(calls), unit="turn", desc="timing", disable=None) as bar:
        queued = jax.default_backend() != "cpu"  # on a CPU calls do not overlap
        seconds = take_turns(calls, rounds=rounds, queued=queued, after_turn=bar.update)
    images = len(batch["mask"])
    return {
        name: spread("images_per_second", images / spent)
        | spread("speedup", seconds[DENSE] / spent)
        for name, spent in seconds.items()
    }


def blank_batch(dense, batch_size: int) -> dict[str, np.ndarray]:
    """This process's part of a batch, of the shapes and dtypes of `pipeline.eval_batches`."""
    count = batch_size // jax.process_count()
    return dict(
        image=np.zeros((count, *dense.image_size, 3), np.uint8),
        label=np.zeros(count, np.int32),
        mask=np.ones(count, bool),
    )


def rows_of(
    dense, found: list[Candidate], names: dict, figures: dict, speeds: dict, *, labels: bool
) -> list[dict]:
    """The dense model's row, and one for each candidate that there is."""
    everything = [Candidate(DENSE, None, None, dense), *found]
    rows = [
        dict(
            method=one.method,
            plan=one.plan,
            budget=one.budget,
            tokens=one.model.tokens_per_block,
            keep=one.model.kept,
            macs=macs(one.model),
            **agreement.summary(figures[names[one.model]], figures[DENSE], labels=labels),
            **speeds.get(names[one.model], dict(images_per_second=None)),
        )
        for one in everything
        if one.model is not None
    ]
    best = agreement.frontier([(row["macs"], row["kl"]) for row in rows])
    return [row | dict(on_frontier=there) for row, there in zip(rows, best, strict=True)]


def main() -> None:
    flags = arguments()
    spec = open_spec(flags)
    card = preprocessing(spec.name)
    changes = dict(crop=flags.crop, interpolation=flags.interpolation)
    card = dataclasses.replace(card, **{k: v for k, v in changes.items() if v is not None})
    devices = DataParallel()
    count = jax.device_count()
    batch_size = flags.batch_size or -(-BATCH_SIZE // count) * count
    devices.check_batch_size("--batch_size", batch_size)

    dense = dense_twin(spec)
    found, left_out = candidates(
        spec,
        dense,
        methods=words(flags.methods),
        budgets=budgets_of(flags, dense),
        plans=words(flags.plans),
        files=words(flags.plan_files),
        layers=numbers(flags.layers or "", int) or None,
    )
    source, unlabeled = open_images(flags, spec, dense.num_classes)
    if left_out:
        print(
            f"left out, as they meet no budget: {', '.join(left_out)}; --methods=NAME says why",
            file=sys.stderr,
        )
    if unlabeled:
        print(f"without labels, so without top-1: {unlabeled}", file=sys.stderr)

    names = {dense: DENSE}
    for one in found:
        names.setdefault(one.model, one.name)
    trained_on = {} if flags.data or spec.config is None else spec.config["data"]
    batches = pipeline.eval_batches(
        source,
        size=dense.image_size,
        **card.view,
        batch_size=batch_size,
        host=jax.process_index(),
        hosts=jax.process_count(),
        threads=flags.threads,
        damaged=trained_on.get("damaged", "stop"),
    )
    blank = devices.put(blank_batch(dense, batch_size))
    models = list(dict.fromkeys(one.model for one in found if one.model not in (None, dense)))
    groups = [models[i : i + AT_A_TIME] for i in range(0, len(models), AT_A_TIME)] or [[]]
    if len(groups) > 1:  # images are decoded once
        batches = list(batches)
    figures, speeds, reasons = {}, {}, {}
    with tqdm(total=len(models), unit="model", disable=None) as bar:

        def see(host: dict) -> None:
            for number in host["index"][host["damaged"]].tolist():
                tqdm.write(f"skipped damaged image: {source[number]['name']}", file=sys.stderr)

        def done(name: str) -> None:
            bar.set_postfix_str(name)
            bar.update()

        for number, group in enumerate(groups):
            jax.clear_caches()  # a process can hold only so many programs
            programs, refusals = compile_some(spec, dense, group, names, card, blank, devices, done)
            passing = (dict(batch) for batch in batches)
            look = dict(see=see) if not number else {}
            found_here, first = agreement.beside_dense(passing, programs, devices, **look)
            timed = turns(programs, first, flags.rounds) if flags.rounds else {}
            figures, speeds, reasons = (
                figures | found_here,
                speeds | timed,
                reasons | refusals,
            )
    found = [one.refuse(reasons[one.model]) if one.model in reasons else one for one in found]

    results = rows_of(dense, found, names, figures, speeds, labels=not unlabeled)
    refused = [
        dict(method=one.method, plan=one.plan, budget=one.budget, reason=one.reason)
        for one in found
        if one.model is None
    ]
    images = len(figures[DENSE].kl)
    print(agreement_report.text(results, refused), file=sys.stderr)
    answer = machine() | dict(
        devices_used=count,
        model=spec.label,
        dtype=jnp.dtype(dense.dtype).name,
        images=images,
        labels=not unlabeled,
        batch_size=batch_size,
        rounds=flags.rounds,
        results=results,
        refused=refused,
    )
    print(json.dumps(answer))  # before the picture, which can fail
    if flags.out and len(results) == 1:
        raise InputError(
            "there is no picture, as no method meets a budget; raise --macs or --shares"
        )
    if flags.out:
        title = f"{spec.label} on {images:,} images"
        content = io.BytesIO()
        agreement_report.picture(results, title=title).save(content, "png")
        write_whole(Path(flags.out), content.getvalue())


if __name__ == "__main__":
    cli.guard(main)
