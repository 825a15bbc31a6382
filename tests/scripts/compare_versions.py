# SPDX-License-Identifier: Apache-2.0
"""Speed beside another version of this project, on the same machine.

git worktree add ../before COMMIT
python -m tests.scripts.compare_versions --before=../before [--rounds=7] \\
    [--model=deit_small_patch16_224] [--keep_rates=1,0.7] [--batch_sizes=1,8,32] [--training=16]

The versions take turns, every other round in the other order; a turn is that version's own
`benchmark` in a process of its own, so nothing but its command line has to be the same. A round's
ratio is ours over before's images per second. The last line of standard output is a JSON object:
medians, lowest and highest of the rounds.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
from tqdm import tqdm

OURS = pathlib.Path(__file__).parents[2]


def turn(folder: pathlib.Path, flags: list[str]) -> dict[tuple, float]:
    """(mode, batch size, keep rate) -> images per second, by the benchmark of a checkout."""
    done = subprocess.run(
        [sys.executable, "-m", "evit_jax.tools.benchmark", *flags],
        cwd=folder,
        env=os.environ | dict(PYTHONPATH=str(folder)),
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"the benchmark of {folder} failed:\n{done.stderr}")
    rows = json.loads(done.stdout.splitlines()[-1])["results"]
    return {(r["mode"], r["batch_size"], r["keep_rate"]): r["images_per_second"] for r in rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--before", required=True, type=pathlib.Path)
    parser.add_argument("--model", default="deit_small_patch16_224")
    parser.add_argument("--keep_rates", default="1,0.7")
    parser.add_argument("--batch_sizes", default="1,8,32")
    parser.add_argument("--training", default="16", help="its batch sizes; '' for none")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=1.0, help="of a variant's turn")
    flags = parser.parse_args()

    shared = [f"--model={flags.model}", f"--keep_rates={flags.keep_rates}", "--rounds=2"]
    shared.append(f"--seconds={flags.seconds}")
    asked = [[*shared, "--mode=inference", f"--batch_sizes={flags.batch_sizes}"]]
    if flags.training:
        asked.append([*shared, "--mode=training", f"--batch_sizes={flags.training}"])
    sides = dict(before=flags.before.resolve(), ours=OURS)
    speeds = dict(before=[], ours=[])
    with tqdm(total=2 * len(asked) * flags.rounds, unit="turn", disable=None) as bar:
        for number in range(flags.rounds):
            figures = dict(before={}, ours={})
            for some in asked:
                for side in reversed(sides) if number % 2 else sides:
                    figures[side] |= turn(sides[side], some)
                    bar.update()
            for side, found in figures.items():
                speeds[side].append(found)

    rows = []
    for case in speeds["ours"][0]:
        before, ours = (np.asarray([found[case] for found in speeds[side]]) for side in sides)
        row = dict(zip(("mode", "batch_size", "keep_rate"), case, strict=True))
        for name, values in dict(before=before, ours=ours, ratio=ours / before).items():
            row[name] = [float(f(values)) for f in (np.median, np.min, np.max)]
        cells = (f"{m:.3g} ({low:.3g} to {high:.3g})" for m, low, high in list(row.values())[3:])
        print("|", " | ".join([*map(str, case), *cells]), "|")
        rows.append(row)
    print(json.dumps(dict(rounds=flags.rounds, model=flags.model, results=rows)))


if __name__ == "__main__":
    main()
