# SPDX-License-Identifier: Apache-2.0
"""Token counts within a budget of multiply-accumulates, chosen for a chip that is not there.

What a block costs on a chip is a staircase in its tokens, and not a regular one: tiles of 8 and 128
are full or not, and a compiler takes another form where memory no longer suffices. So counts near
those of the plain plan, the one that `macs` alone gives, are priced by the chip's compiler. The
plan to find does the most multiply-accumulates for each estimated cycle, or byte, of all whose
multiply-accumulates are within `BAND` of the budget.

A price is that of one block without reduction. It depends on the tokens and the batch size alone,
so few programs are compiled: one for each count. A reducing block is taken to cost as attention
does at the tokens that enter and as the MLP does at those that leave, in the ratio of their
multiply-accumulates. That only ranks plans: the first few are compiled whole, beside the plain and
the dense one, and what they cost decides.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

from tqdm import tqdm

from evit_jax.errors import InputError
from evit_jax.measure.calibration import check_search
from evit_jax.measure.chips import Estimate, Target
from evit_jax.measure.programs import without_program_cache
from evit_jax.plan.counts import Keep
from evit_jax.plan.flops import block_macs, macs, seen_by

BAND = 0.95  # of the budget, the fewest multiply-accumulates
NEAR = 0.12  # how far counts may be from the plain plan's
TILE = 8  # what counts are multiples of, but for the plain plan's own
WORTH = 1.001  # a plan that promises less than this over the plain one is not tried
MOST = 20_000  # plans that are ranked; with many reducing blocks each has fewer counts
TRIED = 2  # plans that are compiled whole, besides the plain one

Price = Callable[[int], float]  # tokens, prefix included -> cost of a block


class Planned(NamedTuple):
    """A plan and what the whole program costs with it."""

    name: str  # "dense", "plain" or "tried"
    keep: Keep
    tokens: tuple[int, ...]  # after each block, prefix included
    macs: int  # of one image
    estimate: Estimate


def fit_chip(
    model,
    target: Target,
    *,
    budget: float,
    batch_size: int,
    layers: Sequence[int] | None = None,
    multiple_of: int | None = None,
) -> tuple[object, list[Planned]]:
    """The plan that a chip does best with, of those within the budget.

    Args:
      model: what it keeps so far does not matter.
      target: the chip.
      budget: multiply-accumulates of one image.
      batch_size: images in a call.
      layers: reducing blocks; default the reducer's own.
      multiple_of: of what all counts are multiples; default `TILE`, and the plain plan's own.

    Returns:
      (the model with the plan, the dense plan, the plain one and those that were tried). If none
      of these is better than the plain plan, the model has that.

    Raises:
      InputError: a budget that no plan meets, or the plain plan does not fit into the chip.
    """
    if type(batch_size) is not int or batch_size < 1:
        raise InputError(f"batch_size must be a whole number from 1 up, got {batch_size!r}")
    check_search(model.reducer)
    keep = model.plan(macs=budget, layers=layers, multiple_of=multiple_of or 1)
    dense, plain = model.clone(keep=()), model.clone(keep=keep)
    counts = candidates(plain, multiple_of or TILE)
    near = sorted({tokens for choices in counts.values() for tokens in choices})
    needed = sorted({plain.prefix + plain.patches, *near})  # what enters the first block too
    total = len(needed) + 2 + TRIED if near else 2
    with without_program_cache(), tqdm(total=total, unit="program", disable=None) as bar:

        def whole(name: str, variant) -> Planned:
            bar.set_postfix_str(f"compiling {name}")
            about = variant.kept, variant.tokens_per_block, macs(variant)
            row = Planned(name, *about, target.logits(variant, batch_size))
            bar.update()
            return row

        rows = [whole("dense", dense), whole("plain", plain)]
        best = rows[-1]
        if best.estimate.cost is None:
            raise InputError(
                f"the plan for this budget does not fit into a {target.name} at batch size "
                f"{batch_size}; try a smaller --batch_size"
            )
        if not near:
            return dense, rows
        costs = {}
        for tokens in needed:
            bar.set_postfix_str(f"compiling a block of {tokens} tokens")
            costs[tokens] = target.block_cost(model, tokens, batch_size)
            bar.update()
        for variant in rank(plain, counts, costs.__getitem__, budget)[:TRIED]:
            rows.append(whole("tried", variant))
            if better(rows[-1], best):
                best = rows[-1]
                break
    return model.clone(keep=best.keep), rows


def better(row: Planned, than: Planned) -> bool:
    """Whether a plan costs less, and does more multiply-accumulates for what it costs."""
    cost, other = row.estimate.cost, than.estimate.cost
    return cost is not None and cost < other and row.macs * other > than.macs * cost


def candidates(plain, tile: int = TILE) -> dict[int, list[int]]:
    """Reducing block -> the tokens to consider after it, nearest to the plain plan's first.

    With many blocks there are fewer, so that no more than `MOST` plans are made of them.
    """
    after = plain.tokens_per_block
    at = [block for block, entry in enumerate(plain.keep) if entry is not None]
    found = {}
    for block in at:
        own = after[block]
        low, high = own * (1 - NEAR), own * (1 + NEAR)
        near = [n for n in range(tile, int(high) + 1, tile) if n >= low]
        found[block] = sorted({own, *near}, key=lambda n, own=own: (abs(n - own), n))
    most = max(map(len, found.values()), default=0)
    while most > 1 and most ** len(found) > MOST:
        most -= 1
    return {block: counts[:most] for block, counts in found.items()}


def rank(plain, counts: dict[int, list[int]], price: Price, budget: float) -> list[object]:
    """Models with other plans within the budget's band, by multiply-accumulates for each cost.

    Args:
      plain: the model with the plan to improve on.
      counts: of `candidates`.
      price: of a block that does not reduce.
      budget: multiply-accumulates of one image.

    Returns:
      those that promise to be better than the plain plan, the best first.
    """
    seen = {}
    for chosen in itertools.product(*counts.values()):
        variant = with_counts(plain, dict(zip(counts, chosen, strict=True)))
        if variant is None or variant.keep in seen:
            continue
        work = macs(variant)
        if variant.keep == plain.keep or BAND * budget <= work <= budget:
            work -= plain.stem_macs + plain.head_macs  # which are not in the prices
            seen[variant.keep] = work / sum(prices(variant, price)), variant
    least = WORTH * seen[plain.keep][0]
    promising = [(ratio, variant) for ratio, variant in seen.values() if ratio > least]
    return [variant for _, variant in sorted(promising, key=lambda pair: -pair[0])]


def with_counts(plain, chosen: dict[int, int]):
    """The model with so many tokens after these blocks; None where its reducer cannot do that."""
    extra = plain.reducer.extra
    entries = [None] * plain.depth
    for block, tokens in chosen.items():
        entries[block] = tokens - plain.prefix - extra
    try:
        keep = plain.plan(tokens=tuple(entries))
    except InputError:  # more than there are, or fewer than it can keep
        return None
    return plain.clone(keep=keep)


def prices(model, price: Price) -> list[float]:
    """What each block of a model is expected to cost."""
    expected, entering = [], model.prefix + model.patches
    for leaving in model.tokens_per_block:
        first, second = seen_by(model.reducer.site, entering, leaving)
        expected.append(
            attention_share(model, first) * price(first)
            + (1 - attention_share(model, second)) * price(second)
        )
        entering = leaving
    return expected


def attention_share(model, tokens: int) -> float:
    """Of a block's multiply-accumulates, at so many tokens."""
    sizes = dict(width=model.width, hidden=model.hidden, gated=model.gated)
    return block_macs(tokens, 0, **sizes) / block_macs(tokens, tokens, **sizes)
