# SPDX-License-Identifier: Apache-2.0
"""The search of DiffRate: a model learns how many tokens each block prunes to and merges to.

Chen et al., "DiffRate: Differentiable Compression Rate for Efficient Vision Transformers" (ICCV
2023). What was learned is read with `learned_counts`, as the tool learned_plan does, and run by the
reducer `diffrate`.
"""

from collections.abc import Mapping, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from evit_jax.errors import InputError, check_name
from evit_jax.plan.counts import Entry, Keep, kept_count
from evit_jax.plan.flops import block_macs
from evit_jax.reducers._merging import cosines, pool, rank, total
from evit_jax.reducers._scores import SCORES, Ranks, importance
from evit_jax.reducers.diffrate import DiffRate
from evit_jax.runtime.forms import by_chip
from evit_jax.tokens import F32, Signals, Tokens, follow


class DiffRateSearch(nn.Module, Ranks):
    """`diffrate` whose counts are learned in training, for the cost of the plan that it is given.

    A reducing block has two distributions, softmaxes of learned logits, over how many patch tokens
    to prune to and to merge to: all P, P - step, P - 2 step, ... The count is the expectation,
    rounded up, and no more than what is there. Logits start at zero, half of the tokens, as in the
    paper, or with `from_plan` where the counts are the plan's: a search that is short starts better
    from a good plan, since at half of all tokens in every block the first one decides alone.

    In training all tokens stay. Sorted by importance, the token of place i is hidden where i is not
    below the count; the gradient is that of the probability that the count is above i
    (straight-through). Tokens to be merged are added to their most similar kept token and hidden,
    and in the gradient leave that token as far as they survive: else a merged token's would be that
    of being there twice, which says that merging is better than it is, most of all in early blocks.
    What `diffrate` computes with these counts is so computed exactly. The loss is `weight` times
    the square of what an image costs too much or too little, in 10^9 multiply-accumulates as
    `plan.flops` counts them, against the plan that was given, which otherwise says which
    blocks reduce, and where to start. In evaluation it is `diffrate` with that plan: the baseline
    of the search.

    The paper trains these logits alone, the model's weights stay as they are:
    config.optimizer.backbone_lr = 0.
    """

    one_plan = True
    learns_counts = True

    by: str = "class"  # the score, one of Top-K's; others need no class token
    step: int = 4  # between candidates
    weight: float = 5.0  # of the squared difference in 10^9 multiply-accumulates
    from_plan: bool = False  # start from the counts of the plan, not from half of all tokens

    def __post_init__(self):
        check_name("score", self.by, SCORES)
        if self.step < 1:
            raise InputError(f"diffrate_search's step is a number from 1 up, got {self.step}")
        super().__post_init__()

    @property
    def evaluated(self) -> DiffRate:
        """The reducer that runs the counts."""
        return DiffRate(by=self.by)

    def default_layers(self, depth: int) -> tuple[int, ...]:
        return self.evaluated.default_layers(depth)

    def matching_macs(self, n: int, keep: Entry, prefix: int, width: int, num_heads: int) -> int:
        return self.evaluated.matching_macs(n, keep, prefix, width, num_heads)

    @nn.compact
    def __call__(self, tokens: Tokens, signals: Signals, keep: Entry) -> Tokens:
        patches = tokens.owner.shape[1]
        starts = dict(zip(("prune", "merge"), self.starts(patches, signals, keep), strict=True))
        logits = [
            self.param(name, lambda _, count=count: first_logits(patches, self.step, count))
            for name, count in starts.items()
        ]
        if not signals.train:
            return self.evaluated(tokens, signals, keep)

        prefix, x = tokens.prefix, tokens.x[:, tokens.prefix :]
        there = tokens.size[:, prefix:] > 0
        scores = importance(self.by, tokens, signals)
        place = rank(jnp.where(there, scores, -jnp.inf))  # (B, n), what is hidden comes last
        before = tokens.aux["counts"][-1][:, 1] if "counts" in tokens.aux else float(patches)
        (prune_to, pruned), (merge_to, merged) = (
            self.chosen(some, place, patches) for some in logits
        )
        prune_to = jnp.broadcast_to(jnp.minimum(prune_to, before), place.shape[:1])
        merge_to = jnp.minimum(merge_to, prune_to)
        stays = there & (place < prune_to[:, None])
        kept = stays & (place < merge_to[:, None])
        moves = stays & ~kept
        # A token is hidden by one of the two, and only that one's gradient says so.
        mask = hidden_where(~stays, pruned) * hidden_where(moves, merged)

        similarity = jnp.where(kept[:, None], cosines(x), -jnp.inf)  # (B, n, n): j is kept
        into = jnp.where(moves, jnp.argmax(similarity, axis=2).astype(jnp.int32), -1)
        fits = jnp.where(moves, jnp.max(similarity, axis=2), 0)

        # 1, but what moves leaves its host as far as it survives.
        share = jnp.where(moves, 1 + jax.lax.stop_gradient(merged) - merged, 1.0)

        def gained(values):  # (B, n) of what moves, added up where it goes
            return total(values * share, into, tokens.patches)

        def sums(*args, form):
            return pool(*args, tokens.patches, form)

        number = gained(moves.astype(F32))[..., None]
        more = by_chip(sums, x, into, share, dtype=x.dtype)
        x = jnp.where(number > 0, ((x + more) / (1 + number)).astype(x.dtype), x)
        weight = jnp.ones_like(tokens.size) if tokens.weight is None else tokens.weight
        front, weight = weight[:, :prefix], weight[:, prefix:]
        weight = jnp.maximum(weight + gained(weight * fits), jnp.minimum(weight, 1)) * mask
        # Sizes are counted, and their gradient is the mask's.
        size = tokens.size[:, prefix:]
        size = jnp.where(kept, size + gained(size), 0) + size * (mask - jax.lax.stop_gradient(mask))
        positions = tokens.positions
        if positions is not None:
            own = positions[:, prefix:]
            moved = [gained(own[..., axis]) for axis in (0, 1)]
            mean = (own + jnp.stack(moved, axis=-1)) / (1 + number)
            own = jnp.where(number > 0, mean, own)
            positions = jnp.concatenate([positions[:, :prefix], own], axis=1)
        index = jnp.arange(tokens.patches, dtype=jnp.int32)[None]
        tokens = tokens.replace(
            x=jnp.concatenate([tokens.x[:, :prefix], x], axis=1),
            size=jnp.concatenate([tokens.size[:, :prefix], size], axis=1),
            owner=follow(tokens.owner, jnp.where(kept, index, into)),
            weight=jnp.concatenate([front, weight], axis=1),
            positions=positions,
        ).report(counts=jnp.stack([prune_to, merge_to], axis=1))
        blocks = [block for block, entry in enumerate(signals.plan) if entry is not None]
        if not blocks or signals.layer < blocks[-1]:
            return tokens
        steps = iter(tokens.aux["counts"])
        found = [entry and tuple(next(steps).T) for entry in signals.plan]
        excess = self.cost(found, tokens, signals) - self.cost(signals.plan, tokens, signals)
        return tokens.report(loss=self.weight * jnp.square(excess))

    def starts(self, patches: int, signals: Signals, keep: Entry) -> tuple[int | None, int | None]:
        """Counts to prune to and merge to at first; None where logits start at zero."""
        if not self.from_plan:
            return None, None
        before = [patches, *(kept_count(e) for e in signals.plan[: signals.layer] if e is not None)]
        return keep if isinstance(keep, tuple) else (before[-1], keep)

    def chosen(self, logits: jax.Array, place: jax.Array, patches: int):
        """The count of a distribution, and whether a token of each place survives.

        Args:
          logits: one for each candidate.
          place: (B, n) int32, from 0.

        Returns:
          The count, float32 and whole, with the gradient of the expectation; and (B, n) float32,
          the probability that the count is above the place.
        """
        counts, share = candidates(patches, self.step), nn.softmax(logits)
        above = counts[None, None] > place[..., None]
        return whole(counts, share), jnp.sum(above * share[None, None], axis=-1)

    def cost(self, plan: Sequence[Entry], tokens: Tokens, signals: Signals) -> jax.Array | float:
        """10^9 multiply-accumulates of all blocks for one image; counts may be arrays (B,)."""
        macs, n, width = 0, tokens.owner.shape[1], tokens.x.shape[-1]
        for entry in plan:
            left = n if entry is None else kept_count(entry)
            macs += block_macs(n + tokens.prefix, 0, width, 0)
            macs += (left + tokens.prefix) * signals.mlp_macs
            if entry is not None:
                macs += self.matching_macs(n, entry, tokens.prefix, width, 1)
            n = left
        return macs / 1e9


def candidates(patches: int, step: int) -> jax.Array:
    """Counts to choose from: patches, patches - step, ... above 0, float32."""
    return jnp.arange(patches, 0, -step, dtype=F32)


def first_logits(patches: int, step: int, count: int | None) -> jax.Array:
    """Logits, float32, of the flattest distribution over the candidates that expects a count.

    Of all distributions with an expectation the one of highest entropy has logits that are linear
    in the candidates. None is the flattest of all: zeros. A count beyond the candidates is brought
    within half a token of the last one, since a softmax never reaches it.
    """
    counts = np.arange(patches, 0, -step, dtype=np.float64)
    if count is None or len(counts) == 1:
        return jnp.zeros(counts.shape, F32)
    centered = counts - counts.mean()
    goal = np.clip(count - 0.5, counts[-1] + 0.5, counts[0] - 0.5) - counts.mean()

    def expected(slope):
        share = np.exp(slope * centered - np.max(slope * centered))
        return share @ centered / share.sum()

    low, high = -20 / step, 20 / step
    for _ in range(60):  # halves until float64 holds no more
        middle = (low + high) / 2
        low, high = (middle, high) if expected(middle) < goal else (low, middle)
    return jnp.asarray(low * centered, F32)


def whole(counts: jax.Array, share: jax.Array) -> jax.Array:
    """The expected count, rounded up, with the gradient of the expectation."""
    expected = jnp.sum(counts * share)
    count = jnp.ceil(expected - 1e-4)  # rounding may leave a whole number slightly too large
    return jax.lax.stop_gradient(count) + (expected - jax.lax.stop_gradient(expected))


def hidden_where(hidden: jax.Array, survival: jax.Array) -> jax.Array:
    """0 where tokens are hidden and else 1, with the gradient of how probably they survive."""
    return jnp.where(hidden, 0.0, 1.0) + (survival - jax.lax.stop_gradient(survival))


def learned_counts(params: Mapping, model) -> Keep:
    """What a trained model's blocks keep: (prune to, merge to), or None, for each.

    Args:
      params: of the model.
      model: with this reducer, and the plan that it was trained with.
    """
    keep, n = [], model.patches
    counts = candidates(model.patches, model.reducer.step)
    for block, entry in enumerate(model.kept):
        steps = None
        if entry is not None:
            learned = params[f"blocks_{block}"]["reduction"]
            chosen = [int(whole(counts, nn.softmax(learned[name]))) for name in ("prune", "merge")]
            prune_to = min(chosen[0], n)
            steps = prune_to, min(chosen[1], prune_to)
            steps = steps if steps[-1] < n else None
            n = n if steps is None else steps[-1]
        keep.append(steps)
    return tuple(keep)


REDUCER = DiffRateSearch
