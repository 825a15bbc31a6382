# SPDX-License-Identifier: Apache-2.0
"""Writes the token counts that a training run learned (diffrate_search) as a plan.

python -m evit_jax.tools.learned_plan --workdir=DIR --out=plan.json

`create_model(plan=)` and --plan of the tools take it, with the same run's weights or the file that
it started from, since the search leaves them as they are (but for LV-ViT's running statistics). The
last line of standard output is a JSON object with the figures: `out`, `tokens`, and the
multiply-accumulates `macs` of an image, `target` of the plan that the run was given, and `dense`.
"""

import json
import sys
from pathlib import Path

from evit_jax import cli
from evit_jax.errors import InputError
from evit_jax.plan.flops import macs
from evit_jax.reducers import as_spec
from evit_jax.reducers.diffrate_search import DiffRateSearch, learned_counts
from evit_jax.storage import write_whole
from evit_jax.tables import runs
from evit_jax.training.trained import load_run


def main() -> None:
    parser = cli.Parser(__doc__)
    cli.add_model_flags(parser, "workdir")
    parser.add_argument("--out", metavar="FILE", type=Path, required=True, help="the plan, as JSON")
    flags = parser.parse_args()
    if flags.workdir is None:
        raise InputError("give --workdir=DIR of a training run with the reducer diffrate_search")
    run = load_run(flags.workdir)
    if not isinstance(run.model.reducer, DiffRateSearch):
        raise InputError(
            f"{flags.workdir} was trained with {type(run.model.reducer).__name__}, which learns no "
            "counts; train with --config.model.reducer=diffrate_search"
        )
    reducer = run.model.reducer.evaluated
    keep = learned_counts(run.params, run.model)
    found = run.model.clone(reducer=reducer, keep=keep)
    figures = dict(macs=macs(found), target=macs(run.model), dense=macs(run.model.clone(keep=())))
    plan = dict(reducer=as_spec(reducer), tokens=keep, **figures)
    write_whole(flags.out, json.dumps(plan, indent=1))
    print(
        f"tokens after each block: {runs(found.tokens_per_block)}; {figures['macs'] / 1e9:.4g} "
        f"GMACs, of {figures['target'] / 1e9:.4g} that were to be -> {flags.out}",
        file=sys.stderr,
    )
    print(json.dumps(dict(out=str(flags.out), tokens=keep) | figures))


if __name__ == "__main__":
    cli.guard(main)
