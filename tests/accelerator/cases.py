# SPDX-License-Identifier: Apache-2.0
"""A comparison of variants in two processes: their turns, and the figures of each."""

import numpy as np

from tests.accelerator.workers import Failed

MOST_CALLS = 300  # in a turn


def take_turns(
    figures: dict, deadline: float, *, rounds: int, seconds: float, awaited: bool
) -> dict:
    """Lets every variant have a turn in each round, every other round backwards.

    Args:
      figures: (worker, variant) -> what preparing it gave. A variant whose turn fails gets an
        `error` there, and no others.
      rounds, seconds: how many, and about how long a turn is.
      awaited: once more with each call awaited before the next.

    Returns:
      (worker, variant) -> dict(queued=seconds a call in each round, awaited=...).
    """
    live = [key for key, found in figures.items() if "error" not in found]
    calls, times = {}, {key: {} for key in live}
    for way in ("queued", "awaited") if awaited else ("queued",):
        for number in range(-1, rounds):  # the first one counts calls
            for side, name in live[:: -1 if number % 2 else 1]:
                key = side, name
                if "error" in figures[key]:
                    continue
                asked = dict(name=name, calls=calls.get(key, 1), queued=way == "queued")
                try:
                    spent = side.ask("turn", deadline, **asked)
                except Failed as error:
                    figures[key]["error"] = str(error)
                    continue
                if number < 0:
                    calls[key] = min(max(round(seconds / spent), 1), MOST_CALLS)
                else:
                    times[key].setdefault(way, []).append(spent)
    return {key: some for key, some in times.items() if "error" not in figures[key]}


def rows_of(
    rounds: dict, figures: dict, batch_size: int, mode: str, peak: dict | None
) -> list[dict]:
    """The figures of a comparison's variants.

    Args:
      rounds: of `take_turns`.
      figures: as there; ours have `flops`, those of an image's forward pass.
      peak: with the `flops_per_second` that shares are of, or None.
    """
    speeds = {name: batch_size / np.asarray(some["queued"]) for (_, name), some in rounds.items()}
    fastest = (peak or {}).get("flops_per_second")
    rows = []
    for (side, name), some in rounds.items():
        found, speed = figures[side, name], speeds[name]
        ours = "flops" in found
        row = dict(framework="JAX" if ours else "PyTorch", variant=name, **found)
        row |= spread("images_per_second", speed)
        row["ms"] = 1000 * batch_size / row["images_per_second"]
        if "awaited" in some:
            row |= spread("latency_ms", 1000 * np.asarray(some["awaited"]))
        if "dense" in speeds:
            row |= spread("over_dense", speed / speeds["dense"])
        if ours:
            work = found["flops"] * (3 if mode == "training" else 1)
            row["flops_per_second"] = work * row["images_per_second"]
            row["peak_share"] = row["flops_per_second"] / fastest if fastest else None
            row["over"] = {
                other: float(np.median(speed / theirs))
                for other, theirs in speeds.items()
                if counterpart(other, name)
            }
        rows.append(row)
    return rows


def counterpart(theirs: str, ours: str) -> bool:
    """Whether a variant of PyTorch's, compiled or not, does the work of one of ours."""
    rate = dict(dense="1", tome="0.7").get(ours, ours.split()[-1])
    name = theirs.removesuffix(" compiled")
    return name == f"EViT {rate}" or (name == "timm" and rate == "1")


def spread(name: str, values: np.ndarray) -> dict:
    """Median, and lowest and highest as NAME_range."""
    low, middle, high = (float(f(values)) for f in (np.min, np.median, np.max))
    return {name: middle, f"{name}_range": [low, high]}
