# SPDX-License-Identifier: Apache-2.0
"""Speed of models beside what their multiply-accumulates promise.

python -m evit_jax.tools.benchmark --model=NAME --keep_rates=1,0.7,0.5 --batch_sizes=1,8 \\
    [--reducers=evit,evit:fuse=False,tome:r=13] [--dtypes=float32,bfloat16] \\
    [--mode=inference,training] [--accuracies=FILE.json --plot=FILE.png] [--out=FILE.md]
python -m evit_jax.tools.benchmark --model=NAME --batch_sizes=128 --dtypes=bfloat16 \\
    --chips=v5e,v6e,v5p,h100,h200 [--rounds=0] [--operations=10]

NAME is a model's, several with commas between them, or a backbone with its sizes such as
vit:width=192,depth=6,num_heads=3,image_size=64,patch_size=8; --workdir=DIR is the model of a
training run, at its own keep rate unless told otherwise. Weights are random, or those of the run's
newest checkpoint: speed does not depend on them. A reducer with a schedule of its own, such as
tome:r=13, takes no keep rate. --macs=0.63e9 instead of keep rates gives each reducer the plan that
create_model has for this budget.

For each model, dtype, mode and batch size the variants, the dense model among them whether asked
for or not, and a matrix product take turns on one device, every other round backwards.
  latency_ms         of a call that is awaited before the next one; in training, of a step
  images_per_second  on a CPU from the same calls; elsewhere from calls that are handed over without
                     waiting and awaited together, as a server or a training loop does
  speedup            images per second over dense, round by round; its median
  macs_ratio         the dense model's multiply-accumulates over the variant's: the speed-up if they
                     were all that takes time
  flops_per_second   2 per multiply-accumulate, in training 3 times that for the backward pass;
                     `flops` are those of a call, without what logits do not need of the last block
                     (`macs` has it, as the papers do)
  peak_share         of the fastest matrix product of the same dtype in this run
  xla_flops          the same by XLA's own count of the compiled program; null if it has none
  peak_memory_bytes  arguments, results and temporaries of the program, by XLA's plan
  compile_seconds    tracing to executable, without any cache of programs on disk; what variants
                     share in memory is paid by the first, the dense one
Figures are medians over rounds; NAME_range holds the lowest and the highest. Inference takes
normalized images that are on the device, keeps the weights in the dtype of the computation (norms
and heads still compute in float32) and returns logits. Training is the step of train.py: uint8
images, label smoothing, AdamW, weights in float32.

--chips compiles the same programs for chips that need not be here, with the chips' own compilers
(pip install "evit_jax[tpu]" or "evit_jax[cuda]"); --rounds=0 does nothing else. Each row then has
`chips`, a dict for each chip, all of it estimated by the compiler for a whole batch on one chip:
  cycles             of a TPU, as its compiler schedules by; without `unestimated` operations
                     (sorts, gathers, scatters) and `pallas_kernels`, which have no estimate
  bytes, kernels     of a GPU: what its kernels read and write, as if no cache kept any of it from
                     one to the next, and how many there are
  speedup            the dense model's cycles or bytes over the variant's
  loops              counted once, since the program does not say how often they go round
  temporary_bytes, argument_bytes, needed_bytes (with results), fits     into the chip's memory
  operations         the --operations most expensive ones, blocks added up
What a TPU's program that does not fit would cost is null.

The last line of standard output is a JSON object; `results` has an object per variant. `noisy` says
that the same program, the dense model or the matrix product, took too different times to trust the
rest: the middle half of its rounds spreads over more than 10 % of their median.
--accuracies takes files with what evaluate printed, for a column and for the picture; of these the
rows with the same model, reducer, keep rate, --layers and --multiple_of count.
"""

import argparse
import io
import json
import sys
from pathlib import Path

from evit_jax import cli
from evit_jax.errors import InputError, check_names
from evit_jax.measure import chip_report
from evit_jax.measure import report as tables
from evit_jax.measure.chips import Target
from evit_jax.measure.comparison import PASSES, Comparison, comparisons_of, describe, measure
from evit_jax.models import check_dtype
from evit_jax.pictures.plot import plot
from evit_jax.runtime.topologies import CHIPS
from evit_jax.spec import numbers, split_specs
from evit_jax.storage import write_whole
from evit_jax.training.trained import ModelSpec, open_spec


def parse() -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    cli.add_model_flags(parser, "model", "workdir", "plan", "layers", "multiple_of")
    cli.add_model_flags(parser, "image_size", "num_classes")
    add("--keep_rates", default="", help="such as 1,0.7,0.5; default 0.7")
    add("--macs", type=float, help="a budget instead, multiply-accumulates of an image")
    add("--reducers", default="", help="such as evit,evit:fuse=False,tome:r=13; default evit")
    add("--batch_sizes", default="1,8", help="images in a call")
    add("--dtypes", default="", help="of the computation, such as float32,bfloat16")
    add("--mode", default="inference", help="inference, training or both")
    add("--chips", default="", help=f"to estimate costs on, of {','.join(CHIPS)}")
    add("--operations", type=int, default=0, metavar="N", help="listed for each program and chip")
    add("--rounds", type=int, default=10, help="in which each variant has a turn; 0: only --chips")
    add("--seconds", type=float, default=0.5, help="of a turn, about; a call at least")
    add("--accuracies", default="", help="files with evaluate's output, with commas between them")
    add("--plot", metavar="FILE.png", help="accuracy against images per second in inference")
    add("--out", metavar="FILE.md", help="the table in Markdown")
    add("--json", metavar="FILE.json", help="the JSON object too")
    flags = parser.parse_args()
    if min(numbers(flags.batch_sizes, int), default=0) < 1:
        raise InputError(f"--batch_sizes must be 1 or more each, got {flags.batch_sizes!r}")
    if flags.rounds < (not flags.chips) or not 0 < flags.seconds < float("inf"):
        raise InputError(
            "--rounds must be 1 or more (0 with --chips, which then measures nothing) and "
            "--seconds more than 0"
        )
    if flags.operations < 0 or (flags.operations and not flags.chips):
        raise InputError("--operations=N needs --chips and must be 0 or more")
    for name, suffix in (("plot", ".png"), ("out", ".md"), ("json", ".json")):
        path = getattr(flags, name)
        if path and (Path(path).suffix.lower() != suffix or not Path(path).parent.is_dir()):
            raise InputError(f"--{name} must be a {suffix} file in a folder that exists: {path}")
    if flags.macs is not None and flags.keep_rates:
        raise InputError("give --keep_rates or --macs, not both")
    timed = "inference" in words(flags.mode) and flags.rounds
    if flags.plot and not (flags.accuracies and timed):
        raise InputError("--plot needs --accuracies=FILE.json, --mode=inference and --rounds")
    return flags


def words(text: str) -> list[str]:
    """ "a, b,a" -> ["a", "b"]; "" -> []."""
    return list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))


def open_specs(flags: argparse.Namespace) -> list[ModelSpec]:
    """The model of the run, or every one of --model once."""
    if not flags.model or flags.workdir:
        return [open_spec(flags)]
    names = dict.fromkeys(split_specs(flags.model))
    return [open_spec(argparse.Namespace(**vars(flags) | dict(model=name))) for name in names]


def measured(flags: argparse.Namespace, comparisons: list[Comparison]) -> tuple[dict, str]:
    """(what the JSON object has, its rows under `results`; a warning or "")."""
    asked = dict(rounds=flags.rounds, seconds=flags.seconds)
    if not flags.rounds:
        rows = [describe(one, variant) for one in comparisons for variant in one.variants]
        return tables.machine() | asked | dict(results=rows), ""
    rows, peaks = measure(comparisons, rounds=flags.rounds, seconds=flags.seconds)
    if not rows:
        raise InputError("no batch fits into the device's memory; try smaller --batch_sizes")
    for row in rows:
        row["peak_share"] = row["flops_per_second"] / float(peaks[row["dtype"]].max())
    noise, warning = tables.judge(
        dict(
            dense_model=[row["variation"] for row in rows if row["reducer"] == "dense"],
            matrix_product=[
                tables.variation(1 / turn) for turns in peaks.values() for turn in turns
            ],
        )
    )
    figures = asked | dict(
        peak_flops_per_second={dtype: float(speeds.max()) for dtype, speeds in peaks.items()},
        noise=noise,
        noisy=tables.noisy(noise),
        results=rows,
    )
    return tables.machine() | figures, warning


def main() -> None:
    flags = parse()
    targets = {name: Target(name) for name in words(flags.chips)}  # before JAX starts
    specs = open_specs(flags)
    modes = words(flags.mode)
    check_names("mode", modes or [flags.mode], PASSES)
    comparisons = comparisons_of(
        specs,
        dtypes=[check_dtype(name) for name in words(flags.dtypes)],
        modes=modes,
        batch_sizes=numbers(flags.batch_sizes, int),
        reducers=list(dict.fromkeys(split_specs(flags.reducers))),
        keep_rates=numbers(flags.keep_rates, float),
        budget=flags.macs,
    )
    top1 = tables.read_accuracies(
        flags.accuracies,
        [spec.label for spec in specs],
        layers=numbers(flags.layers or "", int) or None,
        multiple_of=specs[0].multiple_of,
    )
    compared = {
        (comparison.spec.label, variant.reducer, variant.keep_rate)
        for comparison in comparisons
        for variant in comparison.variants
    }
    if flags.accuracies and not any(key[1] != "dense" for key in compared & top1.keys()):
        raise InputError(f"--accuracies={flags.accuracies} has none of the variants to be timed")

    figures, warning = measured(flags, comparisons)
    rows = figures["results"]
    for row in rows:
        row["top1"] = top1.get((row["model"], row["reducer"], row["keep_rate"]))
    if targets:
        chip_report.add_estimates(rows, comparisons, targets, operations=flags.operations)
        figures["compilers"] = {name: target.compiler for name, target in targets.items()}

    texts = [tables.text(figures)] if flags.rounds else []
    texts += [f"warning: {warning}"] if warning else []
    texts += [chip_report.text(rows)] if targets else []
    print(*texts, sep="\n", file=sys.stderr)
    print(json.dumps(figures))  # before files, which can fail
    if flags.out:
        pages = [tables.markdown(figures, warning)] if flags.rounds else []
        pages += [chip_report.markdown(rows)] if targets else []
        write_whole(Path(flags.out), "\n".join(pages))
    if flags.json:
        write_whole(Path(flags.json), json.dumps(figures) + "\n")
    if flags.plot:
        names = ", ".join(dict.fromkeys(row["model"] for row in rows))
        picture = plot(
            tables.lines_of(rows),
            title=f"{names} on {figures['device']}",
            x_label="images per second",
            y_label="top-1 accuracy, %",
        )
        content = io.BytesIO()
        picture.save(content, "png")
        write_whole(Path(flags.plot), content.getvalue())


if __name__ == "__main__":
    cli.guard(main)
