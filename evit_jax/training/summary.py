# SPDX-License-Identifier: Apache-2.0
"""What finished runs reached, side by side; runs that differ in their seed alone are one row."""

import json
import math
from pathlib import Path
from statistics import fmean, median, stdev
from typing import NamedTuple

from evit_jax.errors import InputError
from evit_jax.spec import flatten
from evit_jax.storage import as_path, explained
from evit_jax.training.trained import read_config
from evit_jax.training.workdir import FREE

RATES = ("keep_rate", "keep_rates", "tokens", "macs", "plan")  # of config.model: how much is kept


class Row(NamedTuple):
    """Runs with one recipe and different seeds."""

    method: str  # the reducer, and the rates of a sandwich; "dense" where nothing is reduced
    kept: str  # the keep rate or budget as the configuration says it; "" where the method decides
    seeds: tuple[int, ...]
    top1: tuple[float, ...]  # test accuracy of each run, 0 to 1
    dense_top1: tuple[float, ...]  # the same weights without reduction
    macs: int  # multiply-accumulates of one image
    images_per_second: float  # median over the runs, at config.run.test_batch_size
    speedup: float  # over the same weights run dense in the same process; median over the runs
    others: tuple[str, ...]  # fields that differ from a row of the same method and rate

    @property
    def label(self) -> str:
        return " ".join(filter(None, (self.method, self.kept, *self.others)))

    @property
    def mean(self) -> float:
        return fmean(self.top1)

    @property
    def spread(self) -> float:
        """The standard deviation over seeds, as of a sample; nan of a single run."""
        return stdev(self.top1) if len(self.top1) > 1 else math.nan


def summarize(workdirs: list[str]) -> tuple[list[Row], list[str]]:
    """(rows by method and cost, the runs that have no result yet).

    Raises:
      InputError: a folder that is no run, a seed that is there twice, or no run that has finished.
    """
    groups, unfinished = {}, []
    for workdir in dict.fromkeys(workdirs):
        config = flatten(read_config(workdir))
        result = final_line(workdir)
        if result is None:
            unfinished.append(workdir)
            continue
        seed = config.pop("seed")
        recipe = {name: value for name, value in config.items() if not name.startswith(FREE)}
        group = groups.setdefault(json.dumps(recipe, sort_keys=True), {})
        if seed in group:
            raise InputError(
                f"{workdir} has the recipe and the seed {seed} of another run; leave one out"
            )
        group[seed] = result
    if not groups:
        raise InputError(
            f"none of these runs has finished: {', '.join(unfinished)}; rerun their commands, "
            "which resumes them"
        )
    recipes = [json.loads(text) for text in groups]
    named = [
        named_by(recipe, group) for recipe, group in zip(recipes, groups.values(), strict=True)
    ]
    rows = []
    for recipe, group, name in zip(recipes, groups.values(), named, strict=True):
        rivals = [one for one, other in zip(recipes, named, strict=True) if other == name]
        differ = sorted(key for key in recipe if any(one.get(key) != recipe[key] for one in rivals))
        rows.append(row(name, group, tuple(f"{key}={recipe[key]}" for key in differ)))
    return sorted(rows, key=lambda one: (one.method != "dense", one.method, -one.macs)), unfinished


def final_line(workdir: str) -> dict | None:
    """The result that a run wrote into metrics.jsonl, None where it has not come to its end."""
    path: Path = as_path(workdir) / "metrics.jsonl"
    with explained(path.parent):
        lines = path.read_text().splitlines() if path.exists() else []
    for line in reversed(lines):
        try:
            figures = json.loads(line)
        except ValueError:  # cut off in the middle
            continue
        if figures.get("final"):
            return figures
    return None


def named_by(recipe: dict, group: dict) -> tuple[str, str]:
    """(method, what it keeps) of a flat configuration."""
    figures = next(iter(group.values()))
    if recipe.get("sandwich"):
        return f"{recipe['model.reducer']} one of {recipe['sandwich']}", ""
    if figures["macs"] == figures["dense_macs"]:
        return "dense", ""
    given = {name: recipe.get(f"model.{name}") for name in RATES}
    kept = [f"{name}={value}" for name, value in given.items() if value]
    if given["keep_rate"]:
        kept = [f"{given['keep_rate']:g}"]
    elif given["macs"]:
        kept = [f"{given['macs'] / 1e9:.4g} GMACs"]
    return str(recipe["model.reducer"]), ", ".join(kept)


def row(name: tuple[str, str], group: dict[int, dict], others: tuple[str, ...]) -> Row:
    seeds = sorted(group)
    results = [group[seed] for seed in seeds]
    return Row(
        *name,
        seeds=tuple(seeds),
        top1=tuple(one["test_top1"] for one in results),
        dense_top1=tuple(one["dense_top1"] for one in results),
        macs=results[0]["macs"],
        images_per_second=median(one["images_per_second"] for one in results),
        speedup=median(one["speedup"] for one in results),
        others=others,
    )
