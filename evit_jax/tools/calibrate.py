# SPDX-License-Identifier: Apache-2.0
"""Finds the token counts that change a model's outputs least, on a folder of your own images.

python -m evit_jax.tools.calibrate --model=deit_tiny_patch16_224 --weights=FILE \\
    --images=FOLDER --macs=0.63e9 [--out=plan.json] [--plot=plan.png]
python -m evit_jax.tools.calibrate --workdir=runs/digits --images=FOLDER --share=0.6
python -m evit_jax.tools.calibrate ... --latency_ms=20 --latency_batch=8
python -m evit_jax.tools.calibrate ... --share=0.6 --chip=v6e --chip_batch=128

No labels are needed: the reduced model is compared with the dense one, by the KL divergence of
their predictions, or by the cosine of the pooled features where there is no head (num_classes=0,
--distortion=cosine). --reducer is ward unless another is named, without a class token ward:by=mean.
--count images are drawn from all that are in the folder and below; do not report figures on them.
A method that can learns from them first (ward: how much each token matters). Then plans within the
budget are measured: the method's own, one keep rate, ramps from each block of the first half; and
the best one's shares of the reduction move between blocks as long as that helps by more than a
standard error.

--latency_ms first finds what number of multiply-accumulates takes so long on this device, by one
keep rate for all layers, and times the plan that was found in turns with that one.

--chip takes --share of the dense model's estimated cycles (of a GPU: bytes moved) on a chip that
need not be here, in bfloat16, as its compiler prices blocks of so many tokens (tools.plan tells
more); counts then fill its tiles of 8 tokens. With --macs it is the share that this is of the dense
model's multiply-accumulates. Compiling takes minutes, before the search. The plan that was found is
compiled whole, and where it costs over 2 % more than the budget the search is done again by prices
that fit it, twice at most; what the plan costs in the end is `estimate`.

--out is a plan file: create_model(plan=FILE), --plan=FILE of evaluate, benchmark and visualize,
--plan_files of compare, --config.model.plan=FILE of train.py. What was measured is noted down
beside it, in FILE.tried; the same command goes on from there if it was interrupted. --plot draws
the distortion against multiply-accumulates, calibrated and with one keep rate; --budgets=0.5,0.8,
shares of the dense model's, calibrates for these as well and gives the plot more points.

The last line of standard output is a JSON object: the plan, its distortion with its standard error,
that of one keep rate, and all that was tried. With --out the numbers that the method learned, which
may be thousands, are in the plan file alone.
"""

import argparse
import dataclasses
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from PIL import Image
from tqdm import tqdm

from evit_jax import cli, tables
from evit_jax.errors import InputError
from evit_jax.measure import chip_report, latency
from evit_jax.measure.calibration import (
    DISTORTIONS,
    Calibrated,
    calibrate,
    first_plans,
    natural_distortion,
)
from evit_jax.measure.chip_cost import ChipCost
from evit_jax.measure.chip_plan import TILE
from evit_jax.measure.chips import Target
from evit_jax.measure.reduction import default_method
from evit_jax.models.images import preprocess
from evit_jax.pictures.plot import Line, plot
from evit_jax.plan.flops import macs
from evit_jax.reducers import as_spec, create_reducer
from evit_jax.runtime.topologies import CHIPS
from evit_jax.spec import numbers
from evit_jax.storage import write_whole
from evit_jax.tokens import Reducer
from evit_jax.training.trained import ModelSpec, open_spec

ATTEMPTS = 3  # at a plan within a chip's budget
SLACK = 0.02  # by which it may miss it


def arguments() -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    cli.add_model_flags(parser, "model", "weights", "workdir")
    add("--images", required=True, metavar="FOLDER", help="with images in it or below")
    add("--count", type=int, default=128, help="images to draw from them; 64 to 256 are enough")
    add("--seed", type=int, default=0, help="of that draw")
    add("--macs", type=float, help="budget: multiply-accumulates of an image, such as 3.0e9")
    add("--share", type=float, help="budget: share of the dense model's, such as 0.6")
    add("--latency_ms", type=float, help="budget: milliseconds for a batch on this device")
    add("--latency_batch", type=int, default=1, help="images in that batch")
    add("--chip", help=f"--share is of its dense cost; one of {', '.join(CHIPS)}")
    add("--chip_batch", type=int, default=128, help="images in a call on the chip")
    add("--budgets", default="", help="shares, such as 0.5,0.63: also calibrated, for the plot")
    cli.add_model_flags(parser, "reducer", "layers", "image_size", "num_classes", "dtype")
    add("--distortion", help=f"{' or '.join(DISTORTIONS)}; default that of what the model returns")
    add("--sweeps", type=int, default=1, help="of the search over the blocks; 0: only ramps")
    add("--batch_size", type=int, default=32, help="images at a time, on the first device")
    add("--out", metavar="FILE.json", help="plan file")
    add("--plot", metavar="FILE.png", help="distortion against multiply-accumulates")
    flags = parser.parse_args()
    given = [value for value in (flags.macs, flags.share, flags.latency_ms) if value is not None]
    if len(given) != 1:
        raise InputError("give a budget: one of --macs=NUMBER, --share=NUMBER, --latency_ms=NUMBER")
    if flags.chip and flags.latency_ms is not None:
        raise InputError("--chip takes --share or --macs; --latency_ms measures on this device")
    if flags.share is not None and not 0 < flags.share <= 1:
        raise InputError(f"--share must be in (0, 1], got {flags.share:g}")
    if flags.count < 1 or flags.sweeps < 0 or flags.batch_size < 1:
        raise InputError("--count and --batch_size must be 1 or more, and --sweeps 0 or more")
    for name, suffix in (("out", ".json"), ("plot", ".png")):
        path = getattr(flags, name)
        if path and (Path(path).suffix.lower() != suffix or not Path(path).parent.is_dir()):
            raise InputError(f"--{name} must be a {suffix} file in a folder that exists: {path}")
    return flags


def draw_images(folder: str, count: int, seed: int) -> list[Path]:
    """As many of the images in a folder and below it, or all of them; sorted.

    Raises:
      InputError: no folder, or no image in it.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise InputError(f"--images={folder} is no folder")
    known = Image.registered_extensions()
    readable = {suffix for suffix, kind in known.items() if kind in Image.OPEN}
    files = sorted(path for path in root.rglob("*") if path.suffix.lower() in readable)
    if not files:
        raise InputError(f"there are no images in {folder} or below")
    chosen = np.random.default_rng(seed).permutation(len(files))[:count]
    return [files[i] for i in sorted(chosen)]


def search(
    flags: argparse.Namespace, spec: ModelSpec, images: np.ndarray, target: Target | None
) -> tuple[list[Calibrated], dict]:
    """The calibrated model for each budget, those of --budgets last, and figures of --chip."""
    dense = spec.build(keep_rate=1)
    params = spec.load_params(dense)
    share = flags.share if flags.macs is None else flags.macs / macs(dense)
    cost, multiple_of = macs, 1
    if target:
        cost, multiple_of = price(flags, dense, spec.layers, target, share), TILE
    whole = cost(dense)
    if flags.latency_ms is not None:
        budget = within_latency(flags, dense, params, spec.layers)
    else:
        budget = flags.macs if flags.macs is not None and not target else share * whole

    def within(goal: float) -> Calibrated:
        with tqdm(unit="plan", desc=f"{goal / whole:.3g} of the dense cost", disable=None) as bar:
            return calibrate(
                dense,
                params,
                images,
                macs=goal,
                reducer=flags.reducer,
                layers=spec.layers,
                distortion=flags.distortion,
                sweeps=flags.sweeps,
                batch_size=flags.batch_size,
                journal=f"{flags.out}.tried" if flags.out else None,
                multiple_of=multiple_of,
                cost=cost,
                progress=shown_by(bar),
            )

    figures = {}
    first = within(budget)
    if target:
        first, figures = on_chip(flags, cost, budget, first, within)
    others = [within(share * whole) for share in numbers(flags.budgets, float)]
    return [first, *others], figures


def on_chip(
    flags: argparse.Namespace,
    cost: ChipCost,
    budget: float,
    found: Calibrated,
    within: Callable[[float], Calibrated],
) -> tuple[Calibrated, dict]:
    """The plan and its figures, searched for again where the whole program costs too much."""
    for attempt in range(1, ATTEMPTS + 1):
        print(f"compiling the plan for {flags.chip} ...", file=sys.stderr)
        estimate = cost.fit(found.model)
        share = estimate.cost / cost.dense.cost
        print(f"{share:.3f} of the dense model's {estimate.unit}", file=sys.stderr)
        if estimate.cost <= (1 + SLACK) * budget or attempt == ATTEMPTS:
            break
        print("more than the budget: searching again, by prices that fit", file=sys.stderr)
        found = within(budget)
    print(chip_report.NOTE, file=sys.stderr)
    return found, dict(
        chip=flags.chip,
        chip_batch=flags.chip_batch,
        compiler=cost.target.compiler,
        estimate=estimate.figures(cost.dense),
    )


def shown_by(bar: tqdm):
    """A function of how much is done and of how much there is to do."""

    def show(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)

    return show


def price(flags: argparse.Namespace, dense, layers, target: Target, share: float) -> ChipCost:
    """What plans cost on the chip, with the method's own part in one near the budget."""
    model = dense.clone(dtype=jnp.dtype("bfloat16"), reducer=create_reducer(flags.reducer))
    near = next(iter(first_plans(model, share * macs(model), layers, TILE).values()))
    with tqdm(unit="program", desc=f"compiling for {target.name}", disable=None) as bar:
        return ChipCost(
            model,
            target,
            flags.chip_batch,
            reduced=model.clone(keep=near),
            progress=shown_by(bar),
        )


def within_latency(flags: argparse.Namespace, dense, params: dict, layers) -> float:
    """Multiply-accumulates of the plan with one keep rate that just takes so long."""
    print("timing plans with one keep rate ...", file=sys.stderr)
    planned, _ = latency.fit_latency(
        dense,
        params,
        batch_size=flags.latency_batch,
        milliseconds=flags.latency_ms,
        layers=layers,
    )
    return macs(planned)


def main() -> None:
    flags = arguments()
    target = Target(flags.chip) if flags.chip else None  # before JAX starts
    flags.reducer = flags.reducer or default_method(open_spec(flags).build(keep_rate=1))
    spec = open_spec(flags)
    model = spec.build(keep_rate=1)
    files = draw_images(flags.images, flags.count, flags.seed)
    images = np.asarray(preprocess(spec.name, files, size=model.image_size))
    flags.distortion = flags.distortion or natural_distortion(model)
    found, chip_figures = search(flags, spec, images, target)
    chosen = found[0]
    shown = [["plan", "tokens after each block", "GMACs", f"{flags.distortion}", ""]]
    for tried in sorted(chosen.tried, key=lambda tried: tried.distortion):
        shown.append(
            [
                tried.name,
                tables.runs(tried.tokens),
                f"{tried.macs / 1e9:.4g}",
                f"{tried.distortion:.5f} ± {tried.error:.5f}",
                "chosen" if tried is chosen.best else "",
            ]
        )
    print(tables.table(shown), file=sys.stderr)
    answer = (
        dict(
            model=spec.label,
            reducer=as_spec(chosen.model.reducer),
            tokens=chosen.best.keep,
            tokens_per_block=chosen.best.tokens,
            macs=chosen.best.macs,
            macs_ratio=macs(model) / chosen.best.macs,
            distortion=flags.distortion,
            value=chosen.best.distortion,
            error=chosen.best.error,
            constant=chosen.constant and chosen.constant.distortion,
            images=len(chosen.best.each),
            dtype=jnp.dtype(model.dtype).name,
        )
        | chip_figures
    )
    if flags.latency_ms is not None:
        answer["latency_ms"] = latency_of(flags, spec, chosen)
    if flags.out:
        write_whole(flags.out, json.dumps(answer, indent=1))
    if flags.plot:
        write_whole(flags.plot, picture(found, model, flags))
    tried = [
        dict(name=one.name, tokens=one.keep, macs=one.macs, value=one.distortion, error=one.error)
        for one in chosen.tried
    ]
    if flags.out:
        answer["reducer"] = without_learned(chosen.model.reducer)
    print(json.dumps(answer | dict(tried=tried)))


def without_learned(reducer: Reducer) -> str | dict:
    """Its description without the fields that it does not show itself, such as `ward`'s probe."""
    spec = as_spec(reducer)
    if isinstance(spec, str):
        return spec
    hidden = {field.name for field in dataclasses.fields(reducer) if not field.repr}
    return {name: value for name, value in spec.items() if name not in hidden}


def latency_of(flags: argparse.Namespace, spec: ModelSpec, chosen: Calibrated) -> float:
    """Median milliseconds of the plan that was found."""
    params = spec.load_params(chosen.model)
    watch = latency.stopwatch(chosen.model, params, batch_size=flags.latency_batch)
    return float(1000 * np.median(watch([chosen.best.keep])[0]))


def picture(found: list[Calibrated], model, flags: argparse.Namespace) -> bytes:
    """The plot as PNG: the best plan, and one keep rate, at each budget."""
    found = sorted(found, key=lambda one: one.best.macs)
    best = [(one.best.macs / 1e9, one.best.distortion, "") for one in found]
    constant = [
        (one.constant.macs / 1e9, one.constant.distortion, "") for one in found if one.constant
    ]
    lines = [Line("calibrated", best)]
    if constant:
        lines.append(Line("one keep rate", constant))
    buffer = io.BytesIO()
    plot(
        lines,
        title=f"{flags.reducer} on {flags.count} images",
        x_label=f"GMACs ({macs(model) / 1e9:.4g} dense)",
        y_label="KL to the dense model, nats" if flags.distortion == "kl" else "cosine distance",
    ).save(buffer, "PNG")
    return buffer.getvalue()


if __name__ == "__main__":
    cli.guard(main)
