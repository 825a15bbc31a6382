# SPDX-License-Identifier: Apache-2.0
"""What a comparison of methods says: the table for a terminal, and the picture."""

from collections.abc import Callable
from pathlib import Path

from PIL import Image

from evit_jax import tables
from evit_jax.measure.candidates import PLANS
from evit_jax.pictures import frontier

Row = dict[str, object]


def with_error(value: float, error: float | None, form: str) -> str:
    """ "0.0523 ± 0.0041"; without the error where there is none."""
    shown = format(value, form)
    return shown if error is None else f"{shown} ± {format(error, form.lstrip('+'))}"


def short(plan: str | None) -> str:
    """A plan's name; of a file's, the file's."""
    return plan or "" if plan in (*PLANS, None) else Path(plan).stem


# Heading -> (the field without which it is left out, its cell); `change` is that in top-1.
COLUMNS: dict[str, tuple[str, Callable[[Row], str]]] = {
    "method": ("method", lambda row: row["method"]),
    "plan": ("method", lambda row: row["plan"]),
    "GMACs": ("macs", lambda row: f"{row['macs'] / 1e9:.4g}"),
    "KL, nats": ("kl", lambda row: with_error(row["kl"], row["kl_error"], ".4f")),
    "same class": (
        "agreement",
        lambda row: with_error(100 * row["agreement"], 100 * (row["agreement_error"] or 0), ".1f"),
    ),
    "top-1": ("top1", lambda row: f"{100 * row['top1']:.2f}"),
    "over dense": (
        "top1",
        lambda row: with_error(100 * row["change"], 100 * (row["top1_error"] or 0), "+.2f"),
    ),
    "won/lost": ("won", lambda row: f"{row['won']}/{row['lost']}"),
    "top-5": ("top5", lambda row: f"{100 * row['top5']:.2f}"),
    "images/s": ("images_per_second", lambda row: f"{row['images_per_second']:,.4g}"),
    "frontier": ("on_frontier", lambda row: "*" if row["on_frontier"] else ""),
    "tokens after each block": ("tokens", lambda row: tables.runs(row["tokens"])),
}


def text(results: list[Row], refused: list[Row]) -> str:
    """A table with a group for each budget, the lowest KL first, and what could not be."""
    dense, *rest = results
    columns = {
        heading: cell for heading, (field, cell) in COLUMNS.items() if dense[field] is not None
    }

    def cells(row: Row) -> list[str]:
        change = None if row["top1"] is None else row["top1"] - dense["top1"]
        return [cell(row | dict(change=change)) for cell in columns.values()]

    shown = [list(columns), cells(dense | dict(plan="", on_frontier=False))]
    for budget in sorted({row["budget"] for row in rest}, key=lambda b: b or float("inf")):
        group = [row for row in rest if row["budget"] == budget]
        shown.append([within(budget), *[""] * (len(columns) - 1)])
        shown += map(cells, sorted(merged(group), key=lambda row: row["kl"]))
    lines = [tables.table(shown)]
    if "top-1" in columns:
        lines[0] += "\nsame class, top-1 and top-5 in %, ± one standard error on the same images"
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in refused:
        what = f"{short(row['plan'])} {within(row['budget'])}"
        reasons.setdefault((row["method"], row["reason"]), []).append(what)
    lines += [
        f"not compared: {method} ({', '.join(what)}): {reason}"
        for (method, reason), what in reasons.items()
    ]
    return "\n".join(lines)


def within(budget: float | None) -> str:
    return "above all budgets" if budget is None else f"within {budget / 1e9:.4g} GMACs"


def merged(rows: list[Row]) -> list[Row]:
    """Rows of one budget, with a method's equal plans in one row: "own = constant"."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault((row["method"], tuple(row["tokens"]), row["kl"]), []).append(row)
    return [
        group[0] | dict(plan=" = ".join(short(row["plan"]) for row in group))
        for group in groups.values()
    ]


def picture(results: list[Row], *, title: str) -> Image.Image:
    """Top-1, or the agreement where there are no labels, and KL against multiply-accumulates."""
    dense, *rest = results
    labels = dense["top1"] is not None
    field = "top1" if labels else "agreement"
    # The best first, so that those of interest have looks that differ most.
    methods = list(dict.fromkeys(row["method"] for row in sorted(rest, key=lambda row: row["kl"])))
    found = []
    for look, method in enumerate(methods):
        seen: set = set()
        for plan in (*PLANS, None):  # files' plans are one line
            rows = [
                row
                for row in rest
                if row["method"] == method
                and (row["plan"] == plan or (plan is None and row["plan"] not in PLANS))
            ]
            points = sorted({(row["macs"] / 1e9, 100 * row[field], row["kl"]) for row in rows})
            if set(points) <= seen:
                continue
            label = {"own": method, "constant": f"{method}, one rate"}.get(plan, f"{method}, file")
            found.append(frontier.Series(label, points, look, PLANS.index(plan) if plan else 2))
            seen.update(points)
    best = {(row["macs"] / 1e9, row["kl"]) for row in rest if row["on_frontier"]}
    return frontier.picture(
        sorted(found, key=lambda one: min(kl for _, _, kl in one.points)),
        sorted(best),
        title=title,
        x_label="GMACs per image",
        y_labels=("top-1 accuracy, %" if labels else "same first class, %", "KL, nats"),
        dense=100 * dense["top1"] if labels else None,
    )
