# SPDX-License-Identifier: Apache-2.0
"""The benchmark's comparisons on chips that are not there, and how their estimates are shown."""

import itertools
import math
from collections.abc import Callable

from tqdm import tqdm

from evit_jax import tables
from evit_jax.measure.chips import Estimate, Target
from evit_jax.measure.comparison import Comparison, describe
from evit_jax.measure.programs import without_program_cache
from evit_jax.measure.report import COLUMNS, Columns, Row, cells, markdown_table, short
from evit_jax.models import preprocessing

NOTE = (
    "Estimated by the compiler, not measured, for a batch on one chip. TPU: cycles that the "
    "compiler schedules by; sorts, gathers and scatters (`no estimate`) and Pallas kernels have "
    "none and are not in the sum. GPU: bytes that kernels read and write, as if no cache kept any "
    "from one to the next. Speed-up: the dense model's figure over the variant's."
)
LOOPED = "Loops that do not say how often they go round count once."


def add_estimates(
    rows: list[Row],
    comparisons: list[Comparison],
    targets: dict[str, Target],
    *,
    operations: int = 0,
) -> None:
    """Gives every row its `chips`: name -> `Estimate.figures`.

    Args:
      rows: of the benchmark; comparisons that have none, as they were skipped, are left out.
      operations: how many of the most expensive ones are listed for each program and chip.
    """
    by_variant = {identity(row): row for row in rows}
    with (
        without_program_cache(),
        tqdm(total=len(rows) * len(targets), unit="program", disable=None) as bar,
    ):
        for comparison, (name, target) in itertools.product(comparisons, targets.items()):
            dense = None
            for variant in comparison.variants:
                row = by_variant.get(identity(describe(comparison, variant)))
                if row is None:
                    break
                bar.set_postfix_str(f"compiling {variant.name} for {name}")
                estimate = estimate_one(target, comparison, variant.model)
                dense = dense or estimate  # the first
                chips = row.setdefault("chips", {})
                chips[name] = estimate.figures(dense, operations=operations)
                bar.update()


def identity(row: Row) -> tuple:
    """What tells a row from the others."""
    names = ("model", "mode", "dtype", "batch_size", "reducer", "keep_rate")
    return tuple(row[name] for name in names)


def estimate_one(target: Target, comparison: Comparison, model) -> Estimate:
    """The comparison's program of one of its models."""
    if comparison.mode == "training":
        card = preprocessing(comparison.spec.name)
        return target.training_step(model, comparison.batch_size, card)
    return target.logits(model, comparison.batch_size)


def cost(figures: dict) -> str:
    """ "18.3 Mcycles" or "8.86 GB"; "" where the program was not compiled."""
    for unit, name in (("cycles", "cycles"), ("bytes", "B")):
        if (value := figures.get(unit)) is not None:
            scale = max(min(math.floor(math.log10(max(value, 1)) / 3), 4), 0)
            return f"{short(value / 1000**scale)} {' kMGT'[scale].strip()}{name}"
    return ""


def shown(row: Row, name: str, form: Callable[[float], str] = "{:,}".format) -> str:
    """A figure of an estimate; "" where there is none."""
    value = row["estimate"].get(name)
    return "" if value is None else form(value)


CHIP_COLUMNS: Columns = {
    "chip": lambda row: row["chip"],
    **{
        name: COLUMNS[name]
        for name in ("model", "mode", "dtype", "batch", "reducer", "keep rate", "top-1")
    },
    "estimated": lambda row: cost(row["estimate"]),
    "speed-up": lambda row: shown(row, "speedup", "{:.2f}".format),
    "MACs ratio": COLUMNS["MACs ratio"],
    "kernels": lambda row: shown(row, "kernels"),
    "Pallas kernels": lambda row: shown(row, "pallas_kernels"),
    "no estimate": lambda row: shown(row, "unestimated"),
    "temporaries, MiB": lambda row: shown(row, "temporary_bytes", lambda n: short(n / 2**20)),
    "in all, GiB": lambda row: shown(row, "needed_bytes", lambda n: short(n / 2**30)),
    "fits": lambda row: "yes" if row["estimate"]["fits"] else "no",
}


def chip_rows(rows: list[Row]) -> list[Row]:
    """A row of the benchmark for each of its chips, chip by chip."""
    names = dict.fromkeys(name for row in rows for name in row["chips"])
    return [row | dict(chip=name, estimate=row["chips"][name]) for name in names for row in rows]


def note(rows: list[Row]) -> str:
    """What the figures are."""
    looped = any(row["estimate"]["loops"] for row in rows)
    return f"{NOTE} {LOOPED}" if looped else NOTE


def text(rows: list[Row]) -> str:
    """For a terminal: the table, what it is, and the most expensive operations if listed."""
    rows = chip_rows(rows)
    common, table = cells(rows, CHIP_COLUMNS)
    parts = [common, tables.table(table), note(rows)]
    for row in rows:
        if listed := row["estimate"].get("operations"):
            parts += ["", operation_table(row, listed)]
    return "\n".join(parts)


def operation_table(row: Row, listed: list[dict]) -> str:
    """The most expensive operations of a program; those of equal name in all blocks add up."""
    estimate = row["estimate"]
    unit = "cycles" if "cycles" in estimate else "bytes"
    names = ("model", "mode", "dtype", "batch", "reducer", "keep rate", "chip")
    texts = {name: CHIP_COLUMNS[name](row) for name in names}
    title = ", ".join(f"{name} {text}" for name, text in texts.items() if text)
    lines = [["operation", "estimated", "share"]]
    lines += [[line["name"], cost(line), f"{line[unit] / estimate[unit]:.1%}"] for line in listed]
    return f"{title}\n{tables.table(lines)}"


def markdown(rows: list[Row]) -> str:
    """The table as a part of a file."""
    rows = chip_rows(rows)
    common, table = cells(rows, CHIP_COLUMNS)
    return "\n\n".join(filter(None, [common, markdown_table(table), note(rows)])) + "\n"
