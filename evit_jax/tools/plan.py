# SPDX-License-Identifier: Apache-2.0
"""Token counts per block for a budget of multiply-accumulates or of time on this device.

python -m evit_jax.tools.plan --model=deit_small_patch16_224 --macs=3.0e9
python -m evit_jax.tools.plan --model=deit_small_patch16_224 --latency_ms=50 --batch_size=8 \\
    [--layers=3,6,9] [--reducer=evit:fuse=False] [--dtype=bfloat16] [--multiple_of=8]
python -m evit_jax.tools.plan --workdir=runs/digits --macs=1e7      for the model of a training run

--macs takes the largest keep rate whose plan costs no more than that for an image. --latency_ms
compiles about ten plans, times them in turns on the first device and takes the one that keeps the
most tokens of those whose median is within the latency. Both print the plans that they looked at,
beside the dense model. The last line of standard output is a JSON object: the plan, its figures,
`argument`, which goes into create_model, and `config`, which goes behind train.py and a config
whose own rate is unset, --config=FILE.py:keep_rate=None.
"""

import argparse
import json
import sys
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from evit_jax import cli, tables
from evit_jax.errors import InputError
from evit_jax.measure import latency
from evit_jax.models import init_params
from evit_jax.plan.counts import Keep
from evit_jax.plan.flops import macs
from evit_jax.training.trained import ModelSpec, open_spec


def arguments() -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    cli.add_model_flags(parser, "model", "workdir")
    add("--macs", type=float, help="budget: multiply-accumulates of an image, such as 3.0e9")
    add("--latency_ms", type=float, help="budget: milliseconds for a batch, measured here")
    add("--batch_size", type=int, default=1, help="images at a time, for --latency_ms")
    cli.add_model_flags(parser, "reducer", "layers", "multiple_of")
    cli.add_model_flags(parser, "image_size", "num_classes", "dtype")
    flags = parser.parse_args()
    if (flags.macs is None) == (flags.latency_ms is None):
        raise InputError("give a budget: either --macs=NUMBER or --latency_ms=NUMBER")
    return flags


def plan_macs(spec: ModelSpec, model, flags: argparse.Namespace):
    """The planned model, a table of it beside the dense one, and no further figures."""
    keep = model.plan(macs=flags.macs, layers=spec.layers, multiple_of=spec.multiple_of)
    planned, dense = model.clone(keep=keep), model.clone(keep=())
    shown = [["", "tokens after each block", "GMACs"]]
    for name, variant in dict(dense=dense, planned=planned).items():
        tokens = tables.runs(variant.tokens_per_block)
        shown.append([name, tokens, f"{macs(variant) / 1e9:.5g}"])
    return planned, shown, {}


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
    spec = open_spec(flags)
    model = spec.build()
    make = plan_macs if flags.latency_ms is None else plan_latency
    planned, shown, figures = make(spec, model, flags)
    print(tables.table(shown), file=sys.stderr)
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
