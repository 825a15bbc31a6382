# SPDX-License-Identifier: Apache-2.0
"""What tests/accelerator.py found, as Markdown."""

from collections.abc import Callable


def table(columns: dict[str, Callable[[dict], str]], rows: list[dict]) -> str:
    """Rows in Markdown; columns that are empty throughout are left out."""
    cells = {heading: [cell(row) for row in rows] for heading, cell in columns.items()}
    cells = {heading: texts for heading, texts in cells.items() if any(texts)}
    lines = [list(cells), ["---"] * len(cells), *zip(*cells.values(), strict=True)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(value: float | None, form: str = "{:,.4g}") -> str:
    """Four digits, no exponent; "" for None."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else form.format(value)


def ranged(row: dict, name: str) -> str:
    if name not in row:
        return ""
    low, high = row[f"{name}_range"]
    return f"{number(row[name])} ({number(low)} to {number(high)})"


def over(word: str) -> Callable[[dict], str]:
    """Images per second over those of the row's counterpart in PyTorch."""

    def cell(row):
        ratios = row.get("over", {})
        found = [ratio for name, ratio in ratios.items() if matches(name, word)]
        return f"{found[0]:.2f}" if found else ""

    return cell


def matches(name: str, word: str) -> bool:
    family, _, compiled = word.partition(", ")
    return name.split()[0] == family and ("compiled" in name) == bool(compiled)


def gibibytes(row: dict) -> str:
    return number(row["memory_bytes"] / 2**30, "{:.2f}") if row.get("memory_bytes") else ""


SPEED = {
    "model": lambda row: row["model"],
    "mode": lambda row: row["mode"],
    "batch": lambda row: str(row["batch_size"]),
    "variant": lambda row: f"{row['framework']} {row['variant']}",
    "images/s": lambda row: ranged(row, "images_per_second"),
    "ms": lambda row: number(row["ms"]),
    "ms, awaited": lambda row: ranged(row, "latency_ms"),
    "over our dense": lambda row: number(row.get("over_dense"), "{:.2f}"),
    "GMACs": lambda row: number(row["macs"] / 1e9, "{:.3g}") if "macs" in row else "",
    "of peak": lambda row: f"{row['peak_share']:.0%}" if row.get("peak_share") else "",
    "over timm": over("timm"),
    "over timm, compiled": over("timm, compiled"),
    "over EViT": over("EViT"),
    "over EViT, compiled": over("EViT, compiled"),
    "GiB": gibibytes,
}
ATTENTION = {
    "heads": lambda row: str(row["num_heads"]),
    "tokens": lambda row: str(row["tokens"]),
    "mode": lambda row: row["mode"],
    "form": lambda row: row["form"],
    "ms": lambda row: number(row.get("ms")),
    "off the model's form": lambda row: number(row.get("difference"), "{:.1e}"),
    "error": lambda row: row.get("error", "")[:100],
}
KERNELS = {
    "kernel": lambda row: f"`{row['kernel'][:90]}`",
    "times a call": lambda row: number(row["calls"]),
    "ms a call": lambda row: number(row["ms"], "{:.4f}"),
    "share": lambda row: f"{row['share']:.1%}",
}
CORRECTNESS = {
    "model": lambda row: row["model"],
    "variant": lambda row: row["variant"],
    "compared": lambda row: row["compared"].replace("_", " "),
    "largest difference": lambda row: number(row["largest_difference"], "{:.2e}"),
    "relative": lambda row: number(row["relative_difference"], "{:.2e}"),
    "same argmax": lambda row: f"{row['same_argmax']:.0%}",
    "finite": lambda row: "yes" if row["finite"] else "NO",
}


def markdown(results: dict) -> str:
    """All tables, then what is missing."""
    machine = results["machine"]
    versions = [f"{name} {version}" for name, version in machine.get("versions", {}).items()]
    if "torch" in machine:
        versions += [f"{name} {machine['torch'][name]}" for name in ("torch", "timm")]
    where = f"{machine.get('device')} ({machine.get('platform')}), {', '.join(versions)}."
    if results["rehearsal"]:
        where += " **A rehearsal with a tiny model: the figures mean nothing.**"
    parts = ["# On an accelerator", where]
    if peak := results["peak"]:
        flops, copied = peak["flops_per_second"] / 1e12, peak["bytes_per_second"] / 1e12
        parts.append(
            f"The fastest matrix product in bfloat16 ran at {flops:.3g} TFLOP/s, the copy at "
            f"{copied:.3g} TB/s, read and written."
        )
    for name, columns in (("speed", SPEED), ("attention", ATTENTION), ("correctness", CORRECTNESS)):
        if rows := results[name]:
            parts += [f"## {name.capitalize()}", table(columns, rows)]
    if tests := results["form_tests"]:
        parts += ["## Tests of the forms", f"    {tests['lines'][-1] if tests['lines'] else ''}"]
    for found in results["profile"]:
        named = (
            f"{found['model']}, {found['variant']}, {found['mode']}, batch {found['batch_size']}"
        )
        parts += [
            f"## Profile of {named}",
            f"{found['ms']:.3g} ms a call, {found['busy_ms']:.3g} ms of kernels.",
            table(KERNELS, found["kernels"]),
        ]
    for heading, lines in (
        ("Notes", results["notes"]),
        ("Skipped for want of time", results["skipped"]),
        ("Failed", [f"{label}: {text}" for label, text in results["errors"].items()]),
    ):
        if lines:
            parts += [f"## {heading}", "\n".join(f"- {line}" for line in lines)]
    return "\n\n".join(parts)
