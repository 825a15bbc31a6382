# SPDX-License-Identifier: Apache-2.0
"""Token counts per block for a budget of multiply-accumulates or of time on this device.

python -m evit_jax.tools.plan --model=deit_small_patch16_224 --macs=3.0e9
python -m evit_jax.tools.plan --model=deit_small_patch16_224 --share=0.65
python -m evit_jax.tools.plan --model=deit_small_patch16_224 --share=0.65 --chip=v6e \\
    --dtype=bfloat16 --batch_size=128
python -m evit_jax.tools.plan --model=deit_small_patch16_224 --latency_ms=50 --batch_size=8 \\
    [--layers=3,6,9] [--reducer=evit:fuse=False] [--dtype=bfloat16] [--multiple_of=8]
python -m evit_jax.tools.plan --workdir=runs/digits --macs=1e7      for the model of a training run

--macs takes the largest keep rate whose plan costs no more than that for an image; --share is that
share of the dense model's. --latency_ms compiles about ten plans, times them in turns on the first
device and takes the one that keeps the most tokens of those whose median is within the latency.

--chip improves on the plan of --macs or --share for a chip that need not be here. What a block
costs there is a staircase in its tokens; so the chip's compiler prices blocks of about as many
tokens, by multiples of 8 or of --multiple_of. Of the plans of 95 to 100 % of the budget it takes
the one that does the most multiply-accumulates for each estimated cycle (of a GPU: for each byte
that its kernels move). That one, the plain plan and the dense model are compiled whole; unless it
costs less than the plain plan, the answer is the plain plan. It takes minutes, for a TPU many.

All print the plans that they looked at, beside the dense model. The last line of standard output is
a JSON object: the plan, its figures, `argument`, which goes into create_model, and `config`, which
goes behind train.py and a config whose own rate is unset, --config=FILE.py:keep_rate=None. With
--chip `estimate` has what benchmark has for a chip, `compiled` the same of all plans that were
compiled whole, and `improved` says whether the plan differs from the plain one.
"""

import argparse
import functools
import json
import sys
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from evit_jax import cli, tables
from evit_jax.errors import InputError
from evit_jax.measure import chip_report, latency
from evit_jax.measure.chip_plan import fit_chip
from evit_jax.measure.chips import Target
from evit_jax.models import init_params
from evit_jax.plan.counts import Keep
from evit_jax.plan.flops import macs
from evit_jax.runtime.topologies import CHIPS
from evit_jax.training.trained import ModelSpec, open_spec


def arguments() -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    cli.add_model_flags(parser, "model", "workdir")
    add("--macs", type=float, help="budget: multiply-accumulates of an image, such as 3.0e9")
    add("--share", type=float, help="budget: share of the dense model's, such as 0.65")
    add("--chip", help=f"to plan for, one of {', '.join(CHIPS)}; with --macs or --share")
    add("--latency_ms", type=float, help="budget: milliseconds for a batch, measured here")
    add("--batch_size", type=int, help="images at a time; 128 with --chip, 1 with --latency_ms")
    cli.add_model_flags(parser, "reducer", "layers", "multiple_of")
    cli.add_model_flags(parser, "image_size", "num_classes", "dtype")
    flags = parser.parse_args()
    if sum(budget is not None for budget in (flags.macs, flags.share, flags.latency_ms)) != 1:
        raise InputError("give a budget: one of --macs=NUMBER, --share=NUMBER, --latency_ms=NUMBER")
    if flags.share is not None and not 0 < flags.share <= 1:
        raise InputError(f"--share must be in (0, 1], got {flags.share:g}")
    if flags.chip and flags.latency_ms is not None:
        raise InputError("--chip takes --macs or --share; --latency_ms measures on this device")
    if flags.batch_size is None:
        flags.batch_size = 128 if flags.chip else 1
    return flags


def budget_of(model, flags: argparse.Namespace) -> float:
    """Multiply-accumulates of one image, by --macs or --share."""
    return flags.macs if flags.share is None else flags.share * macs(model.clone(keep=()))


def plan_macs(spec: ModelSpec, model, flags: argparse.Namespace):
    """The planned model, a table of it beside the dense one, and no further figures."""
    budget = budget_of(model, flags)
    keep = model.plan(macs=budget, layers=spec.layers, multiple_of=spec.multiple_of)
    planned, dense = model.clone(keep=keep), model.clone(keep=())
    shown = [["", "tokens after each block", "GMACs"]]
    for name, variant in dict(dense=dense, planned=planned).items():
        tokens = tables.runs(variant.tokens_per_block)
        shown.append([name, tokens, f"{macs(variant) / 1e9:.5g}"])
    return planned, shown, {}


def plan_chip(spec: ModelSpec, model, flags: argparse.Namespace, target: Target):
    """The planned model, a table of the plans that were compiled whole, and their figures."""
    planned, rows = fit_chip(
        model,
        target,
        budget=budget_of(model, flags),
        batch_size=flags.batch_size,
        layers=spec.layers,
        multiple_of=None if spec.multiple_of == 1 else spec.multiple_of,
    )
    dense = rows[0].estimate
    shown = [["", "tokens after each block", "GMACs", "estimated", "speed-up", "fits", ""]]
    compiled = []
    for row in rows:
        figures = row.estimate.figures(dense)
        speedup = "" if figures["speedup"] is None else f"{figures['speedup']:.3f}"
        fits = "yes" if row.estimate.fits else "no"
        chosen = "planned" if row.keep == planned.kept else ""
        about = row.name, tables.runs(row.tokens), f"{row.macs / 1e9:.4g}"
        shown.append([*about, chip_report.cost(figures), speedup, fits, chosen])
        about = dict(plan=row.name, keep=row.keep, tokens=row.tokens, macs=row.macs)
        compiled.append(about | figures)
    chosen = next(number for number, row in enumerate(rows) if row.keep == planned.kept)
    return (
        planned,
        shown,
        dict(
            batch_size=flags.batch_size,
            chip=flags.chip,
            compiler=target.compiler,
            estimate=rows[chosen].estimate.figures(dense),
            improved=rows[chosen].name == "tried",
            compiled=compiled,
        ),
    )


def plan_latency(spec: ModelSpec, model, flags: argparse.Namespace):
    """The planned model, a table of all that were measured, and the figures in it."""
    params = spec.run_params(model) or init_params(model, jax.random.key(0))
    watch = latency.stopwatch(model, params, batch_size=flags.batch_size)
    compiled = set()
    with tqdm(total=latency.PROGRAMS, unit="program", disable=None) as bar:

        def measure(keeps: Sequence[Keep]) -> Sequence[np.ndarray]:
            seconds = watch(keeps)
            bar.update(len(set(keeps) - compiled))
            compiled.update(keeps)
            return seconds

        planned, rows = latency.fit_latency(
            model,
            params,
            batch_size=flags.batch_size,
            milliseconds=flags.latency_ms,
            layers=spec.layers,
            multiple_of=spec.multiple_of,
            measure=measure,
        )
    shown = [["keep rate", "tokens after each block", "GMACs", "ms: median (range)", ""]]
    for row in rows:
        shown.append(
            [
                f"{row.keep_rate:g}",
                tables.runs(row.tokens),
                f"{row.macs / 1e9:.4g}",
                f"{row.milliseconds:.4g} ({row.lowest:.4g} to {row.highest:.4g})",
                "planned" if row.keep == planned.keep else "",
            ]
        )
    chosen = next(row for row in rows if row.keep == planned.keep)
    figures = dict(
        batch_size=flags.batch_size,
        device=jax.devices()[0].device_kind,
        keep_rate=chosen.keep_rate,
        latency_ms=chosen.milliseconds,
        dense_latency_ms=rows[0].milliseconds,
        speedup=rows[0].milliseconds / chosen.milliseconds,
        measured=[row._asdict() for row in rows],
    )
    return planned, shown, figures


def main() -> None:
    flags = arguments()
    make = plan_macs if flags.latency_ms is None else plan_latency
    if flags.chip:
        make = functools.partial(plan_chip, target=Target(flags.chip))  # before JAX starts
    spec = open_spec(flags)
    model = spec.build()
    planned, shown, figures = make(spec, model, flags)
    print(tables.table(shown), file=sys.stderr)
    if flags.chip:
        print(chip_report.NOTE, file=sys.stderr)
    counts = ",".join(map(str, planned.keep))
    answer = dict(
        model=spec.label,
        reducer=spec.reducer,
        dtype=jnp.dtype(planned.dtype).name,
        multiple_of=spec.multiple_of,
        keep=planned.keep,
        tokens=planned.tokens_per_block,
        macs=macs(planned),
        macs_ratio=macs(model.clone(keep=())) / macs(planned),
        argument=f"tokens=({counts}), reducer={spec.reducer!r}",
        config=f'--config.model.tokens="({counts})" --config.model.reducer={spec.reducer}',
    )
    print(json.dumps(answer | figures))


if __name__ == "__main__":
    cli.guard(main)
