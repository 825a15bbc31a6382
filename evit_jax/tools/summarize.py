# SPDX-License-Identifier: Apache-2.0
"""What finished training runs reached: a table over methods, rates and seeds, and a plot.

python -m evit_jax.tools.summarize runs/* [--out=FILE.png] [--cost=images_per_second]

Runs that differ in nothing but their seed (and where things are) are one row: the mean of their
test accuracies, their standard deviation, and the lowest and the highest. Beside it the accuracy of
the same weights without reduction, multiply-accumulates, and the speed that each run measured at
its end; compare speeds only of runs that had the machine to themselves. Runs without a result are
named and left out. The plot has a line for each method, accuracy against multiply-accumulates or
against images per second, with a bar from the lowest to the highest of several seeds.

The last line of standard output is a JSON object: `rows`, each with `method`, `kept`, `seeds`,
`top1`, `dense_top1`, `macs`, `images_per_second`, `speedup`, `others`; and `unfinished`.
"""

import io
import json
import math
import sys
from pathlib import Path

from evit_jax import cli
from evit_jax.errors import InputError
from evit_jax.pictures.plot import Line, plot
from evit_jax.storage import write_whole
from evit_jax.tables import table
from evit_jax.training.summary import Row, summarize

COSTS = {  # flag -> the axis, and a row's place on it
    "macs": ("GMACs per image", lambda row: row.macs / 1e9),
    "images_per_second": ("images per second", lambda row: row.images_per_second),
}
HEADING = ["", "runs", "GMACs", "test top-1, %", "lowest to highest", "its weights dense"]


def cells(row: Row) -> list[str]:
    spread = "" if math.isnan(row.spread) else f" ± {100 * row.spread:.2f}"
    several = f"{100 * min(row.top1):.2f} to {100 * max(row.top1):.2f}"
    return [
        row.label,
        str(len(row.top1)),
        f"{row.macs / 1e9:.4g}",
        f"{100 * row.mean:.2f}{spread}",
        several if len(row.top1) > 1 else "",
        f"{100 * sum(row.dense_top1) / len(row.dense_top1):.2f}",
        f"{row.images_per_second:,.0f}",
        f"x{row.speedup:.2f}",
    ]


def picture(rows: list[Row], cost: str):
    """A line for each method through its rates."""
    label, place = COSTS[cost]
    methods = dict.fromkeys(row.method for row in rows)
    lines = []
    for method in methods:
        points, bars = [], {}
        for row in (row for row in rows if row.method == method):
            spot = place(row), 100 * row.mean
            points.append((*spot, row.kept))
            if len(row.top1) > 1:
                bars[spot] = 100 * min(row.top1), 100 * max(row.top1)
        lines.append(Line(method, sorted(points), bars))
    return plot(lines, title="Test accuracy", x_label=label, y_label="top-1, %")


def main() -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("workdirs", nargs="+", metavar="WORKDIR", help="of train.py")
    parser.add_argument("--out", metavar="FILE", type=Path, help="the plot, as .png")
    parser.add_argument("--cost", choices=list(COSTS), default="macs", help="the plot's other axis")
    options = parser.parse_args()
    if options.out and options.out.suffix != ".png":
        raise InputError(f"--out={options.out} is not the name of a .png")
    rows, unfinished = summarize(options.workdirs)
    for workdir in unfinished:
        print(f"{workdir} has no result yet; rerun its command", file=sys.stderr)
    print(table([[*HEADING, "images/s", "over dense"], *map(cells, rows)]))
    if options.out:
        content = io.BytesIO()
        picture(rows, options.cost).save(content, "PNG")
        write_whole(options.out, content.getvalue())
    print(json.dumps(dict(rows=[row._asdict() for row in rows], unfinished=unfinished)))


if __name__ == "__main__":
    cli.guard(main)
