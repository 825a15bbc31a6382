# SPDX-License-Identifier: Apache-2.0
"""Token counts per block that change a model's outputs least, found on a user's own images.

No labels: what is compared is the reduced model with the dense one. The counts come from a small
family (`Backbone.ramp`: one whole number decides the shape, the budget the rest), then shares of
the reduction move between blocks as long as that helps by more than chance: with few images a free
search finds what suits these images alone.
"""

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np

from evit_jax.errors import InputError
from evit_jax.measure.blockwise import Blockwise
from evit_jax.plan.counts import Keep, kept_count, rate_within, round_up
from evit_jax.plan.flops import macs as count_macs
from evit_jax.reducers import as_spec, create_reducer, written
from evit_jax.storage import write_whole
from evit_jax.tokens import Reducer

FEWEST = 8  # images
STEP = 1.3  # by which a block's share of the reduction grows or shrinks in the search
CERTAIN = 1.0  # standard errors by which a change has to help


@dataclasses.dataclass(frozen=True)
class Tried:
    """A plan and how much it changes the model's outputs."""

    name: str  # what kind of plan it is
    keep: Keep
    tokens: tuple[int, ...]  # after each block, prefix included
    macs: int  # of one image
    each: np.ndarray  # (images,) distortion of each image

    @property
    def distortion(self) -> float:
        """Mean over images."""
        return float(np.mean(self.each))

    @property
    def error(self) -> float:
        """Standard error of the mean."""
        return float(np.std(self.each, ddof=1) / math.sqrt(len(self.each)))


@dataclasses.dataclass(frozen=True)
class Calibrated:
    """A calibrated model, and what was tried."""

    model: object  # with the best reducer and plan
    tried: tuple[Tried, ...]  # in the order in which they were
    best: Tried
    constant: Tried | None  # one keep rate for all layers, where that meets the budget


def kl_divergence(dense: tuple, reduced: tuple) -> np.ndarray:
    """(B,) KL(dense || reduced) of the predictions, in nats, from (logits, features) of each."""
    p, q = (log_softmax(np.asarray(answers[0], np.float64)) for answers in (dense, reduced))
    return np.sum(np.exp(p) * (p - q), axis=1)


def cosine_distance(dense: tuple, reduced: tuple) -> np.ndarray:
    """(B,) 1 - cosine of the features that heads read, mean over heads; for models without any."""
    a, b = (np.asarray(answers[1], np.float64) for answers in (dense, reduced))
    lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return np.mean(1 - np.sum(a * b, axis=-1) / lengths, axis=1)


DISTORTIONS = dict(kl=kl_divergence, cosine=cosine_distance)


def natural_distortion(model) -> str:
    """Of what a model returns: predictions, or features."""
    return "kl" if model.num_classes else "cosine"


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """(B, classes) -> logarithms of the probabilities."""
    logits = logits - logits.max(axis=1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def calibrate(
    model,
    params: dict,
    images: np.ndarray,
    *,
    macs: float | None = None,
    share: float | None = None,
    reducer: str | dict | Reducer | None = None,
    layers: Sequence[int] | None = None,
    distortion: str | None = None,
    learn: bool = True,
    sweeps: int = 1,
    batch_size: int = 32,
    multiple_of: int = 1,
    cost: Callable[[object], float] = count_macs,
    journal: str | Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Calibrated:
    """Finds the plan within a budget that changes the model's outputs least on these images.

    Args:
      model: a model of this package; what it keeps so far does not matter.
      params: its parameters.
      images: (B, H, W, 3) float32, normalized, as the model sees them; 64 to 256 are enough. Do not
        report figures on them.
      macs: the budget, multiply-accumulates of one image as `plan.flops.macs` counts them, or
        whatever else `cost` counts.
      share: the same as a share of the dense model's.
      reducer: default the model's own.
      layers: blocks that may reduce; default the reducer's own.
      distortion: "kl" of the predictions, or "cosine" of the features; default that of what the
        model returns.
      learn: let the reducer learn from the images where it can, see `Reducer.evidence`.
      sweeps: how often the search goes over the blocks; 0 only tries the family.
      batch_size: images at a time, on the first device; a last smaller batch is left out.
      multiple_of: of what the tokens after each reducing block are a multiple; not where the plan
        is the method's own.
      cost: what a model costs, such as `chip_cost.ChipCost` of a chip.
      journal: a file to note down what was tried in; one that is there is gone on with.
      progress: called with the number of plans tried, and at most to try.

    Returns:
      `Calibrated`; its model's `keep` is what `tokens` of `create_model` takes.

    Raises:
      InputError: no budget or two, too few images, or a budget that no plan meets.
    """
    if (macs is None) == (share is None):
        raise InputError("give a budget: either macs, multiply-accumulates of one image, or share")
    distortion = distortion or natural_distortion(model)
    if distortion not in DISTORTIONS or (distortion == "kl" and not model.num_classes):
        also = " (this model has no head: cosine)" if distortion == "kl" else ""
        raise InputError(f"distortion must be kl or cosine, got {distortion!r}{also}")
    batch_size = min(batch_size, len(images))
    count = len(images) - len(images) % max(batch_size, 1)
    if count < FEWEST:
        raise InputError(f"calibration needs at least {FEWEST} images, got {len(images)}")
    model = model.clone(keep=(), reducer=create_reducer(reducer or model.reducer))
    check_search(model.reducer)
    budget = macs if share is None else share * cost(model)
    search = Search(model, params, images[:count], batch_size, distortion)
    if learn:
        search.learn()
    search.resume(journal)
    plans = first_plans(search.model, budget, layers, multiple_of, cost)
    blocks = sum(entry is not None for entry in next(iter(plans.values())))
    most = len(plans) + sweeps * 2 * blocks

    for name, keep in plans.items():
        search.measure(name, keep)
        progress(len(search.tried), most)
    best = min(search.tried, key=lambda tried: tried.distortion)
    shift = functools.partial(shifted, budget=budget, multiple_of=multiple_of, cost=cost)
    for _ in range(sweeps):
        before = best
        best = search.sweep(best, shift, lambda: progress(len(search.tried), most))
        if best is before:
            break
    progress(most, most)
    constant = next((tried for tried in search.tried if tried.name == "constant"), None)
    return Calibrated(search.model.clone(keep=best.keep), tuple(search.tried), best, constant)


def check_search(reducer: Reducer) -> None:
    """Raises InputError for a method whose counts cannot be moved from block to block."""
    if reducer.brings_back:
        raise InputError(
            f"{written(as_spec(reducer))} brings all patches back before the last block, and plans "
            "are searched for methods that keep fewer in every block; give it keep rates, counts "
            "or macs"
        )


def first_plans(
    model,
    budget: float,
    layers: Sequence[int] | None,
    multiple_of: int = 1,
    cost: Callable[[object], float] = count_macs,
) -> dict[str, Keep]:
    """What the search begins with: the method's own plan, one keep rate, and ramps.

    Raises:
      InputError: none of them meets the budget.
    """
    at = model.reducer.default_layers(model.depth) if layers is None else tuple(layers)
    own = model.reducer.schedule(model.patches, model.prefix, at, model.depth)
    plans, refused = {}, None

    def cost_of(keep: Keep) -> float:
        return cost(model.clone(keep=keep))

    if any(entry is not None for entry in own):
        plans["own"] = model.plan(layers=layers)
    else:

        def constant(rate: float) -> Keep:
            return model.plan(keep_rate=rate, layers=layers, multiple_of=multiple_of)

        try:
            plans["constant"] = constant(rate_within(budget, lambda rate: cost_of(constant(rate))))
        except InputError as error:
            refused = error
    same = dict(layers=at, multiple_of=multiple_of, cost=cost)
    for first in range(model.depth // 2 + 1):
        if (keep := model.ramp(budget, first=first, **same)) is not None:
            plans[f"ramp from block {first}"] = keep
    plans = {
        name: keep
        for name, keep in plans.items()
        if any(entry is not None for entry in keep) and cost_of(keep) <= budget
    }
    if not plans:
        raise refused or InputError(
            f"no plan of {model.reducer} costs at most {budget:g} and reduces anything; the dense "
            f"model costs {cost_of(()):g}"
        )
    return plans


class Search:
    """Measures plans on the same images."""

    def __init__(self, model, params, images, batch_size: int, distortion: str):
        self.model, self.distortion = model, DISTORTIONS[distortion]
        self.parts = Blockwise(model, params)
        self.batches = np.split(np.asarray(images, np.float32), len(images) // batch_size)
        self.starts = [self.parts.start(self.parts.params, batch) for batch in self.batches]
        self.states: list[dict] = [{} for _ in self.batches]
        self.tried: list[Tried] = []
        self.known: dict[Keep, list[float]] = {}
        self.journal: Path | None = None

    def learn(self) -> None:
        """Lets the reducer learn from the images and their mirror images."""
        total, key = None, jax.random.key(0)
        mirrored = [batch[:, :, ::-1] for batch in self.batches]
        for number, batch in enumerate(self.batches + mirrored):
            each = jax.random.fold_in(key, number)
            evidence = self.parts.evidence(self.model.reducer, batch, each)
            if all(one is None for one in jax.tree.leaves(evidence, is_leaf=lambda a: a is None)):
                return
            evidence = jax.tree.map(lambda a: np.asarray(a, np.float64), evidence)
            total = evidence if total is None else jax.tree.map(np.add, total, evidence)
        self.model = self.model.clone(reducer=self.model.reducer.learned(total))

    def resume(self, journal: str | Path | None) -> None:
        """Goes on with a journal, if it is of the same model, reducer, images and distortion."""
        if journal is None:
            return
        self.journal = Path(journal)
        about = self.distortion.__name__, dataclasses.asdict(self.model.reducer)
        digest = hashlib.sha256(repr(about).encode())
        for _, answers in self.starts:  # rounded: they depend on the number of threads
            digest.update(np.round(np.asarray(answers[0], np.float64), 2).tobytes())
        self.header = dict(calibration=digest.hexdigest())
        lines = self.journal.read_text().splitlines() if self.journal.exists() else []
        if lines and json.loads(lines[0]) == self.header:
            for line in map(json.loads, lines[1:]):
                self.known[keep_of(line["keep"])] = line["each"]

    def measure(self, name: str, keep: Keep) -> Tried:
        """The distortion of a plan, measured unless it is known."""
        for tried in self.tried:
            if tried.keep == keep:
                return tried
        planned = self.model.clone(keep=keep)
        if keep not in self.known:
            each = []
            for (entered, dense), states in zip(self.starts, self.states, strict=True):
                answers = self.parts.answers(self.model.reducer, keep, entered, states)
                each.append(self.distortion(dense, answers))
            self.known[keep] = np.concatenate(each).tolist()
            if self.journal:
                lines = [self.header, *(dict(keep=k, each=e) for k, e in self.known.items())]
                write_whole(self.journal, "".join(f"{json.dumps(line)}\n" for line in lines))
        each = np.asarray(self.known[keep])
        tried = Tried(name, keep, planned.tokens_per_block, count_macs(planned), each)
        self.tried.append(tried)
        return tried

    def sweep(
        self, best: Tried, shift: Callable[..., Keep | None], tick: Callable[[], None]
    ) -> Tried:
        """Makes every block's share of the reduction smaller and larger, and keeps what helps.

        Args:
          shift: `shifted`, of the model, a plan, a block and a factor.
          tick: called after each plan that was measured.
        """
        for block in [i for i, entry in enumerate(best.keep) if entry is not None]:
            for factor in (STEP, 1 / STEP):
                self.forget(best.keep)
                keep = shift(self.model, best.keep, block, factor)
                if keep is None or keep == best.keep:
                    continue
                tried = self.measure(f"block {block} {'more' if factor > 1 else 'less'}", keep)
                tick()
                gain = best.each - tried.each
                error = np.std(gain, ddof=1) / math.sqrt(len(gain))
                if np.mean(gain) > CERTAIN * error:
                    best = tried
                    break
        return best

    def forget(self, keep: Keep) -> None:
        """Drops kept states that plans near this one will not look up."""
        for states in self.states:
            for reducer, plan in [key for key in states if key[1] != keep[: len(key[1])]]:
                del states[reducer, plan]


def shifted(
    model,
    keep: Keep,
    block: int,
    factor: float,
    *,
    budget: float,
    multiple_of: int = 1,
    cost: Callable[[object], float] = count_macs,
) -> Keep | None:
    """The plan with another share of the reduction in one block, and the others made to fit.

    Args:
      block: whose logarithm of the share of tokens that it keeps is multiplied by `factor`.
      budget, multiple_of, cost: as for `calibrate`.

    Returns:
      Within the budget, or None where there is none.
    """
    logs, n, extra = {}, model.patches, model.reducer.extra
    for number, entry in enumerate(keep):
        if entry is not None:
            logs[number] = math.log(kept_count(entry) / n) * (factor if number == block else 1.0)
            n = kept_count(entry) + extra
    last = model.depth - 1
    tail = model.last if keep[last] is not None else None
    fixed = dict(
        prefix=model.prefix, extra=extra, smallest=lambda n: model.reducer.smallest(n, model.prefix)
    )

    def plan(scale: float) -> Keep:
        entries, n = [], model.patches
        for number in range(model.depth):
            count = n
            if number in logs:
                least = model.reducer.smallest(n, model.prefix)
                count = max(round(n * math.exp(logs[number] * scale)), least, 1)
                if number == last and tail is not None:
                    count = max(min(count, tail), least)
            entries.append(count if count < n else None)
            n = count if count == n else count + extra
        return round_up(tuple(entries), model.patches, multiple_of=multiple_of, **fixed)

    low, high = 0.0, 1.0
    while cost(model.clone(keep=plan(high))) > budget:
        low, high = high, 2 * high
        if high > 64:
            return None
    for _ in range(40):
        middle = (low + high) / 2
        fits = cost(model.clone(keep=plan(middle))) <= budget
        low, high = (low, middle) if fits else (middle, high)
    return plan(high)


def keep_of(entries: Sequence) -> Keep:
    """A plan as JSON has it -> as a model takes it."""
    return tuple(tuple(entry) if isinstance(entry, list) else entry for entry in entries)
