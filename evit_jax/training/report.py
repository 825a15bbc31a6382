# SPDX-License-Identifier: Apache-2.0
"""What a run prints about its model; what a dry run says of the program is in `dry_run`."""

import re
from pathlib import Path

import jax
import numpy as np

from evit_jax.plan.flops import macs
from evit_jax.tables import runs, table
from evit_jax.tokens import Reducer
from evit_jax.training.progressive import stage_models


def size_of(tree) -> int:
    """Bytes of a tree of arrays or their shapes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def count_of(tree) -> int:
    """Numbers in a tree of arrays or their shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def parameter_table(params: dict) -> str:
    """Parameters per part of the model, its blocks taken together."""
    parts: dict[str, list] = {}
    for name, tree in params.items():
        parts.setdefault(re.sub(r"_\d+$", "", name) if "blocks_" in name else name, []).append(tree)
    rows = [["part", "parameters", "shapes"]]
    for name, trees in parts.items():
        shapes = (
            ""
            if len(trees) > 1
            else " ".join("x".join(map(str, leaf.shape)) for leaf in jax.tree.leaves(trees[0]))
        )
        times = f"{name} (x{len(trees)})" if len(trees) > 1 else name
        rows.append([times, f"{count_of(trees):,}", shapes])
    rows.append(["all", f"{count_of(params):,}", ""])
    return table(rows)


def result_table(rows: dict[str, dict]) -> str:
    """Variants of one model over the same parameters; the last one is what the others compare to.

    Args:
      rows: name -> tokens (per block), macs, test_top1 (fraction), images_per_second (one a round).
    """
    cells = [["", "tokens after each block", "GMACs", "test top-1", "images/s: median (range)"]]
    for name, row in rows.items():
        speed = row["images_per_second"]
        cells.append(
            [
                name,
                runs(row["tokens"]),
                f"{row['macs'] / 1e9:.4g}",
                f"{100 * row['test_top1']:.2f} %",
                f"{np.median(speed):,.0f} ({min(speed):,.0f} to {max(speed):,.0f})",
            ]
        )
    *others, (last, base) = rows.items()
    for name, row in others:
        fewer, faster = base["macs"] / row["macs"], speedup(row, base)
        gain = 100 * (row["test_top1"] - base["test_top1"])
        cells.append(
            [f"{name} over {last}", "", f"1/{fewer:.3f}", f"{gain:+.2f}", f"x{faster:.2f}"]
        )
    return table(cells)


def speedup(row: dict, base: dict) -> float:
    """Median ratio of images per second, round by round: both saw the same machine."""
    return float(np.median(np.divide(row["images_per_second"], base["images_per_second"])))


def summary(rows: dict[str, dict]) -> dict:
    """The figures of `result_table` for programs: the first row's, the last one's as dense_*."""
    first, last = next(iter(rows.values())), list(rows.values())[-1]
    figures = {name: first[name] for name in ("test_top1", "test_top5", "test_loss", "macs")}
    figures["images_per_second"] = float(np.median(first["images_per_second"]))
    figures["dense_top1"], figures["dense_macs"] = last["test_top1"], last["macs"]
    figures["dense_images_per_second"] = float(np.median(last["images_per_second"]))
    figures["test_top1_of"] = {name: row["test_top1"] for name, row in rows.items()}
    return figures | dict(speedup=speedup(first, last))


def line(figures: dict, total: int) -> str:
    """One log line of a training run from what goes into metrics.jsonl."""
    shown = {
        "train_loss": "loss {:.4f}",
        "train_top1": "top-1 {:.1%}",
        "lr": "lr {:.2e}",
        "keep_rate": "keep {:.3g}",
        "images_per_second": "{:,.0f} images/s",
        "data_wait": "waiting for data {:.0%}",
        "test_top1": "TEST top-1 {:.2%}",
        "test_top5": "top-5 {:.2%}",
        "test_loss": "loss {:.4f}",
    }
    head = f"step {figures['step']}/{total}  epoch {figures['epoch']:.1f}"
    cells = [
        text.format(figures[name]) for name, text in shown.items() if figures.get(name) is not None
    ]
    return "  ".join([head, *cells])


def stage_line(model, stage) -> str:
    """A stage's tokens in a few words."""
    trained = stage_models(model, stage)
    return "tokens " + " with ".join(runs(variant.tokens_per_block) for variant in trained)


def stage_table(model, stages, *, steps_per_epoch: int) -> str:
    """The keep rates in training: from which epoch on each block has how many tokens.

    Where several plans are trained together, there is a line for each.
    """
    rows = [["from epoch", "keep rate", "tokens after each block", "GMACs"]]
    for stage in stages:
        for i, variant in enumerate(stage_models(model, stage)):
            rate = "" if stage.keep_rate is None or stage.others else f"{stage.keep_rate:.3g}"
            when = f"{stage.step / steps_per_epoch:g}" if i == 0 else "with"
            tokens = runs(variant.tokens_per_block)
            rows.append([when, rate, tokens, f"{macs(variant) / 1e9:.4g}"])
    return table(rows)


def size_line(params: dict, train_images: int, test_images: int, total_steps: int) -> str:
    """What a run is about to do, and where."""
    return (
        f"{count_of(params):,} parameters, {train_images:,} training images, "
        f"{test_images:,} test images, {total_steps:,} steps on {jax.device_count()} "
        f"{jax.default_backend()} device(s) of {jax.process_count()} process(es)"
    )


def what_next(workdir: Path, reducer: Reducer) -> str:
    """What to try with a finished run."""
    rates = "" if reducer.one_plan else " --keep_rate=1,0.9,0.7,0.5"
    tries = [f"evaluate --workdir={workdir}{rates}"]
    if reducer.learns_counts:
        tries = [
            f"learned_plan --workdir={workdir} --out=plan.json",
            f"evaluate --workdir={workdir} --plan=plan.json",
        ]
    tries.append(f"visualize --workdir={workdir} --out=patches.png")
    lines = [f"  python -m evit_jax.tools.{line}" for line in tries]
    return "\n".join(["what to try next:", *lines])
