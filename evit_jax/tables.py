# SPDX-License-Identifier: Apache-2.0
"""Aligned tables and short forms of numbers, for terminals."""


def table(rows: list[list[str]]) -> str:
    """Rows of cells -> aligned text; the first row is the heading."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "-" * (sum(widths) + 2 * len(widths) - 2), *lines[1:]])


def runs(counts: tuple[int, ...]) -> str:
    """(197, 197, 140) -> "197 x2, 140"."""
    parts, i = [], 0
    while i < len(counts):
        same = next((j for j in range(i, len(counts)) if counts[j] != counts[i]), len(counts)) - i
        parts.append(f"{counts[i]} x{same}" if same > 1 else f"{counts[i]}")
        i += same
    return ", ".join(parts)
