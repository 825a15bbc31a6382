# SPDX-License-Identifier: Apache-2.0
"""DiffRate: prune what the class token ignores, then merge what it looks at least.

Chen et al., "DiffRate: Differentiable Compression Rate for Efficient Vision Transformers"
(ICCV 2023).
"""

import dataclasses

import jax.numpy as jnp

from evit_jax.errors import InputError, check_name
from evit_jax.plan.counts import Entry, Keep
from evit_jax.reducers._merging import cosines, merge, total
from evit_jax.reducers._scores import Ranks, best, importance, map_macs
from evit_jax.tokens import Signals, Tokens, drop

# Name of a DeiT and its 10^9 multiply-accumulates, as printed -> what the authors' search found for
# its 12 blocks at 196 patches: tokens to prune to, and tokens to merge to, class token included.
# fmt: off
PUBLISHED = {
    "deit_tiny@0.6": ((197, 196, 180, 157, 130, 107, 86, 73, 63, 51, 40, 3),
                      (197, 187, 167, 139, 114, 90, 76, 66, 57, 45, 37, 3)),
    "deit_tiny@0.7": ((197, 196, 194, 180, 150, 123, 98, 82, 68, 60, 52, 3),
                      (197, 196, 192, 158, 133, 103, 88, 72, 64, 58, 49, 3)),
    "deit_tiny@0.8": ((197, 197, 196, 186, 166, 147, 117, 103, 92, 80, 74, 3),
                      (197, 196, 190, 172, 154, 125, 107, 96, 84, 78, 70, 3)),
    "deit_tiny@0.9": ((197, 197, 196, 190, 182, 166, 141, 125, 113, 105, 99, 3),
                      (197, 196, 194, 188, 172, 147, 129, 115, 107, 103, 96, 3)),
    "deit_tiny@1.0": ((197, 197, 196, 194, 188, 184, 178, 164, 156, 137, 129, 21),
                      (197, 197, 196, 190, 186, 154, 148, 156, 145, 135, 125, 21)),
    "deit_small@2.3": ((197, 192, 168, 143, 121, 105, 92, 74, 62, 45, 33, 3),
                       (197, 180, 156, 127, 109, 98, 80, 66, 52, 37, 31, 3)),
    "deit_small@2.5": ((197, 192, 174, 156, 131, 115, 111, 99, 76, 50, 39, 3),
                       (197, 186, 160, 133, 119, 107, 96, 82, 66, 43, 37, 3)),
    "deit_small@2.7": ((197, 196, 182, 160, 141, 127, 115, 105, 88, 66, 49, 3),
                       (197, 188, 170, 147, 131, 119, 109, 96, 76, 54, 45, 3)),
    "deit_small@2.9": ((197, 196, 190, 168, 150, 139, 129, 117, 99, 78, 58, 3),
                       (197, 194, 176, 156, 141, 133, 121, 107, 88, 64, 56, 3)),
    "deit_small@3.1": ((197, 197, 194, 180, 160, 147, 137, 129, 115, 92, 76, 3),
                       (197, 196, 186, 164, 150, 141, 133, 121, 103, 78, 68, 3)),
    "deit_base@8.7": ((197, 192, 172, 156, 131, 107, 90, 72, 56, 33, 17, 3),
                      (197, 178, 162, 141, 115, 96, 78, 60, 47, 21, 13, 3)),
    "deit_base@10.0": ((197, 194, 182, 168, 148, 129, 113, 101, 82, 49, 25, 3),
                       (197, 186, 174, 156, 137, 117, 105, 90, 66, 31, 19, 3)),
    "deit_base@10.4": ((197, 196, 188, 174, 156, 141, 121, 103, 90, 58, 25, 3),
                       (197, 190, 184, 164, 145, 131, 107, 94, 74, 31, 21, 3)),
    "deit_base@11.5": ((197, 197, 197, 188, 170, 154, 139, 123, 107, 72, 43, 3),
                       (197, 197, 192, 178, 158, 145, 127, 111, 94, 50, 35, 3)),
    "deit_base@12.5": ((197, 197, 196, 192, 184, 170, 154, 139, 129, 94, 58, 3),
                       (197, 196, 194, 190, 176, 160, 145, 131, 115, 68, 47, 3)),
}
# fmt: on


@dataclasses.dataclass(frozen=True)
class DiffRate(Ranks):
    """Sorts patch tokens by class attention, drops the last, merges the next to last.

    `keep` is (P, M): the P most attended tokens stay, and of these the last P - M are each merged
    into the most similar of the first M, by the cosine of the tokens themselves. One count is M
    alone, and nothing is pruned. A token becomes the plain mean of itself and what merges into it.
    Kept tokens come in descending order of class attention, ties to the lower index.

    In later attention a token weighs w_j + sum_i w_i cos(x_i, x_j) over what merged into it, w
    being 1 at first: a patch counts for less where it fits less. It travels in `Tokens.weight`;
    `size` counts whole patches. Public code adds the logarithm of it, and in evaluation so takes
    that of a negative number where cosines are negative. Here no weight falls below 1, which is
    what that code does in training.

    `budget` takes the counts that the authors found, such as "deit_tiny@0.6". They are 12 blocks'
    at 196 patches, and are scaled to another number of patches. Their last block leaves next to
    nothing, which only suits logits that are read off the class token.
    """

    weights_at_least_one = True

    budget: str = ""  # one of PUBLISHED; "" leaves it to the rates or counts given to the model
    weighted: bool = False  # means weighted by size
    proportional: bool = True  # later attention weighs tokens as above

    by: str = "class"  # the score, one of Top-K's; others need no class token

    def __post_init__(self):
        super().__post_init__()
        if self.budget:
            check_name("budget of diffrate", self.budget, PUBLISHED)

    def default_layers(self, depth: int) -> tuple[int, ...]:
        return tuple(range(1, depth))

    def matching_macs(self, n: int, keep: Entry, prefix: int, width: int, num_heads: int) -> int:
        prune_to, merge_to = keep if isinstance(keep, tuple) else (n, keep)
        return (prune_to - merge_to) * merge_to * width + map_macs(self.by, n, prefix, width)

    def schedule(self, patches: int, prefix: int, layers: tuple[int, ...], depth: int) -> Keep:
        if not self.budget:
            return (None,) * depth
        published = PUBLISHED[self.budget]
        if depth != len(published[0]):
            raise InputError(
                f"diffrate's budget {self.budget} has counts for {len(published[0])} blocks and "
                f"the model has {depth}; leave it out and give rates, counts or macs"
            )
        keep, n = [], patches
        for block, steps in enumerate(zip(*published, strict=True)):
            entry = None
            if block in layers:
                # More than what is left, by earlier merging, is what is left.
                prune_to, merge_to = (-(-(step - 1) * patches // 196) for step in steps)
                prune_to = min(prune_to, n)
                entry = prune_to, min(merge_to, prune_to)
                entry = entry if entry[-1] < n else None
            keep.append(entry)
            n = n if entry is None else entry[-1]
        return tuple(keep)

    def __call__(self, tokens: Tokens, signals: Signals, keep: Entry) -> Tokens:
        prune_to, merge_to = keep if isinstance(keep, tuple) else (tokens.patches, keep)
        tokens = drop(tokens, best(importance(self.by, tokens, signals), tokens, prune_to))
        if prune_to == merge_to:
            return tokens

        first = tokens.prefix + merge_to  # of those that are merged
        similarity = cosines(tokens.x[:, first:], tokens.x[:, tokens.prefix : first])
        into = jnp.argmax(similarity, axis=2).astype(jnp.int32)  # (B, P - M)
        into = jnp.where(tokens.size[:, first:] > 0, into, -1)  # nothing of empty slots
        own = jnp.arange(merge_to, dtype=jnp.int32)[None]
        own = jnp.broadcast_to(own, (into.shape[0], merge_to))
        size = tokens.size[:, tokens.prefix :]
        merged = merge(
            tokens,
            jnp.concatenate([own, into], axis=1),
            size if self.weighted else jnp.ones_like(size),
            merge_to,
            proportional=False,
        )
        if not self.proportional:
            return merged
        weight = jnp.ones_like(tokens.size) if tokens.weight is None else tokens.weight
        gained = total(weight[:, first:] * jnp.max(similarity, axis=2), into, merge_to)
        weight, gained = weight[:, :first], jnp.pad(gained, ((0, 0), (tokens.prefix, 0)))
        return merged.replace(weight=jnp.maximum(weight + gained, jnp.minimum(weight, 1)))


REDUCER = DiffRate
