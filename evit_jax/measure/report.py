# SPDX-License-Identifier: Apache-2.0
"""What a benchmark says of its rows: spread, noise, the table and the lines of the plot."""

import json
import os
import platform
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import jax
import numpy as np

from evit_jax import tables
from evit_jax.errors import InputError
from evit_jax.pictures.plot import Line

QUIET = 0.1  # largest variation of a quiet machine
JUDGED = 4  # fewer rounds say nothing about it
Row = dict[str, object]
Columns = dict[str, Callable[[Row], str]]


def spread(name: str, values: np.ndarray) -> dict[str, float | list[float]]:
    """Median of the rounds, and the lowest and the highest of them as NAME_range."""
    low, middle, high = (float(f(values)) for f in (np.min, np.median, np.max))
    return {name: middle, f"{name}_range": [low, high]}


def variation(seconds: np.ndarray) -> float | None:
    """Interquartile range over median of one program's rounds; None for too few of them."""
    if len(seconds) < JUDGED:
        return None
    low, middle, high = np.percentile(seconds, (25, 50, 75))
    return float((high - low) / middle)


def judge(variations: dict[str, list[float | None]]) -> tuple[dict[str, float | None], str]:
    """What the times of programs that always do the same say about the machine.

    Args:
      variations: kind of program -> `variation` of each of them.

    Returns:
      (kind -> the largest, a line of warning or "").
    """
    noise = {
        kind: max((value for value in values if value is not None), default=None)
        for kind, values in variations.items()
    }
    if None in noise.values():
        return noise, f"too few rounds to say how noisy the machine is; --rounds={JUDGED} would do"
    kind = max(noise, key=noise.get)
    if noise[kind] <= QUIET:
        return noise, ""
    return noise, (
        f"the machine is too noisy: the middle half of the rounds of the same "
        f"{kind.replace('_', ' ')} spreads over {noise[kind]:.0%} of their median, more than "
        f"{QUIET:.0%}; end other work on it, or ask for more --rounds and --seconds"
    )


def noisy(noise: dict[str, float | None]) -> bool:
    """Whether one of `judge`'s figures is over the limit."""
    return any(value is not None and value > QUIET for value in noise.values())


def machine() -> dict[str, str | int]:
    """The device that was measured and the versions of what ran on it."""
    device = jax.devices()[0]
    kind = device.device_kind
    if device.platform == "cpu":
        kind = f"{processor()}, {os.cpu_count()} cores"
    versions = {name: metadata.version(name) for name in ("jax", "jaxlib", "flax")}
    return dict(
        device=kind,
        device_count=jax.device_count(),
        devices_used=1,
        platform=device.platform,
        python=platform.python_version(),
        **versions,
    )


def processor() -> str:
    """Its name as Linux has it, elsewhere the architecture."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def read_accuracies(
    files: str,
    models: list[str],
    *,
    layers: tuple[int, ...] | None = None,
    multiple_of: int = 1,
) -> dict[tuple, float]:
    """Top-1 of variants from what `evaluate` printed.

    Args:
      files: paths with commas between them; "" is none.
      models: as the user wrote them; a file that names no model is of the first one.
      layers: the reducing blocks that were asked for, None for the model's own; rows with others
        are another plan, and left out.
      multiple_of: what its tokens were rounded up to multiples of; the same holds.

    Returns:
      (model, reducer, keep rate) -> fraction; a dense model's are "dense" and 1.

    Raises:
      InputError: a file that holds something else.
    """
    found = {}
    for path in filter(None, files.split(",")):
        try:
            content = json.loads(Path(path).read_text())
            for row in content["results"]:
                key = row.get("reducer", "evit"), row["keep_rate"]
                plan = row.get("layers"), row.get("multiple_of", 1)
                if row["keep_rate"] == 1:
                    key = "dense", 1.0
                elif plan != (list(layers) if layers else None, multiple_of):
                    continue
                found[content.get("model", models[0]), *key] = float(row["top1"])
        except (ValueError, KeyError, TypeError, AttributeError):
            raise InputError(
                f"--accuracies={path} is not what evit_jax.tools.evaluate prints: one JSON object "
                "whose results have keep_rate, reducer and top1"
            ) from None
    return found


def ranged(row: Row, name: str, form: Callable[[float], str]) -> str:
    """Median (lowest to highest)."""
    low, high = row[f"{name}_range"]
    return f"{form(row[name])} ({form(low)} to {form(high)})"


def short(value: float) -> str:
    """Three digits, more where there are more before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


COLUMNS: Columns = {
    "model": lambda row: row["model"],
    "mode": lambda row: row["mode"],
    "dtype": lambda row: row["dtype"],
    "batch": lambda row: f"{row['batch_size']}",
    "reducer": lambda row: row["reducer"],
    "keep rate": lambda row: "" if row["keep_rate"] is None else f"{row['keep_rate']:g}",
    "top-1": lambda row: "" if row["top1"] is None else f"{row['top1']:.2%}",
    "ms": lambda row: short(row["latency_ms"]),
    "images/s": lambda row: ranged(row, "images_per_second", short),
    "speed-up": lambda row: ranged(row, "speedup", "{:.2f}".format),
    "MACs ratio": lambda row: f"{row['macs_ratio']:.2f}",
    "GMACs": lambda row: short(row["flops"] / row["batch_size"] / 2e9),
    "by XLA": lambda row: (
        "" if row["xla_flops"] is None else short(row["xla_flops"] / row["batch_size"] / 2e9)
    ),
    "TFLOP/s": lambda row: f"{row['flops_per_second'] / 1e12:.3g}",
    "of peak": lambda row: f"{row['peak_share']:.0%}",
    "compiled, s": lambda row: short(row["compile_seconds"]),
    "MiB": lambda row: (
        "" if row["peak_memory_bytes"] is None else short(row["peak_memory_bytes"] / 2**20)
    ),
}
SHARED = ("chip", "model", "mode", "dtype", "batch")  # said once where all rows agree


def cells(rows: list[Row], columns: Columns) -> tuple[str, list[list[str]]]:
    """(what all rows share, the table with its heading)."""
    columns = {name: [cell(row) for row in rows] for name, cell in columns.items()}
    shared = [name for name in SHARED if len(set(columns.get(name, []))) == 1]
    common = ", ".join(f"{name} {columns[name][0]}" for name in shared)
    shown = {name: texts for name, texts in columns.items() if name not in shared and any(texts)}
    return common, [list(shown), *map(list, zip(*shown.values(), strict=True))]


def summary(figures: dict) -> str:
    """One paragraph: what was measured where."""
    peaks = figures["peak_flops_per_second"].items()
    peaks = " and ".join(f"{value / 1e12:.3g} TFLOP/s in {name}" for name, value in peaks)
    noise = figures["noise"].items()
    noise = ", ".join(
        f"{kind.replace('_', ' ')} {share(value) or 'not known'}" for kind, value in noise
    )
    versions = ", ".join(f"{name} {figures[name]}" for name in ("jax", "jaxlib", "flax"))
    return (
        f"One {figures['platform']} device ({figures['device']}), Python {figures['python']}, "
        f"{versions}. Medians (lowest to highest) of {figures['rounds']} rounds; matrix products "
        f"reached {peaks}; largest interquartile range of the same program's rounds: {noise}."
    )


def text(figures: dict) -> str:
    """For a terminal."""
    common, table = cells(figures["results"], COLUMNS)
    return "\n".join([common, tables.table(table), summary(figures)])


def markdown(figures: dict, warning: str) -> str:
    """The same as a file."""
    common, table = cells(figures["results"], COLUMNS)
    parts = [common, markdown_table(table), summary(figures), warning and f"**{warning}**"]
    return "\n\n".join(filter(None, parts)) + "\n"


def markdown_table(table: list[list[str]]) -> str:
    """Rows of cells, the first one the heading."""
    heading, *rows = table
    rule = ["---", *["---:"] * (len(heading) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (heading, rule, *rows))


def lines_of(rows: list[Row]) -> list[Line]:
    """Top-1 in percent against images/s in inference: a line for each reducer and setting.

    Each begins with the dense model. Variants of one method that have schedules of their own
    (tome:r=8, tome:r=13) share a line.
    """
    rows = [row for row in rows if row["mode"] == "inference" and row["top1"] is not None]
    settings = [tuple(row[name] for name in ("model", "dtype", "batch_size")) for row in rows]
    varying = [len({setting[i] for setting in settings}) > 1 for i in range(3)]
    lines: dict[str, list[Row]] = {}
    dense: dict[tuple, list[Row]] = {}
    for row, setting in zip(rows, settings, strict=True):
        if row["reducer"] == "dense":
            dense[setting] = [row]
            continue
        scheduled = row["keep_rate"] is None
        method = row["reducer"].partition(":")[0] if scheduled else row["reducer"]
        texts = (setting[0], method, setting[1], f"batch {setting[2]}")
        shown = (varying[0], True, *varying[1:])
        label = " ".join(text for text, show in zip(texts, shown, strict=True) if show)
        lines.setdefault(label, list(dense.get(setting, []))).append(row)
    return [
        Line(label, [point(row) for row in sorted(group, key=lambda row: -row["macs"])])
        for label, group in lines.items()
    ]


def point(row: Row) -> tuple[float, float, str]:
    """Where a row is in the plot, and the keep rate or the reducer's settings to write there."""
    label = "dense" if row["reducer"] == "dense" else row["reducer"].partition(":")[2]
    if row["reducer"] != "dense" and row["keep_rate"] is not None:
        label = f"{row['keep_rate']:g}"
    return row["images_per_second"], 100 * row["top1"], label
