# SPDX-License-Identifier: Apache-2.0
"""EViT: keep what the class token attends to, fuse the rest (Liang et al., ICLR 2022)."""

import dataclasses

import jax
import jax.numpy as jnp

from evit_jax.errors import check_name
from evit_jax.plan.counts import Entry
from evit_jax.reducers._scores import Ranks, best, importance
from evit_jax.tokens import F32, Signals, Tokens, destinations, drop, follow

TINY = jnp.finfo(F32).tiny
SMALLEST = 1e-9  # of a score, so that scores of zero still make a mean


@dataclasses.dataclass(frozen=True)
class EViT(Ranks):
    """Keeps the K patch tokens with the highest class attention, in descending order of it.

    Ties go to the lower index. With `fuse` the others become one token appended last, the sum of
    a_i x_i over them with a_i the class attention. As in the reference code (evit.py:245-250) it is
    not divided by the sum of a_i.

    Where positions are not in the tokens (rotary positions, relative bias), the fused token is at
    the mean of theirs weighted by a_i, or where the most attended of them is.

    For models without a class token `by` names another of Top-K's scores. The fused token then is
    the mean weighted by it, since a score may be of any scale and pooling counts the token by its
    size.
    """

    fuse: bool = True  # False drops them
    fused_at: str = "mean"  # or "strongest"
    by: str = "class"

    def __post_init__(self):
        check_name("evit's fused_at", self.fused_at, ("mean", "strongest"))
        super().__post_init__()

    @property
    def extra(self) -> int:
        return int(self.fuse)

    def __call__(self, tokens: Tokens, signals: Signals, keep: Entry) -> Tokens:
        if self.by == "class":
            attention = signals.class_attention()[:, tokens.prefix :]  # (B, n)
            _, kept = jax.lax.top_k(attention, keep)  # (B, K)
        else:
            attention = importance(self.by, tokens, signals)
            kept = best(attention, tokens, keep)
            there = tokens.size[:, tokens.prefix :] > 0
            attention = jnp.where(there, jnp.maximum(attention, SMALLEST), 0)
        if not self.fuse:
            return drop(tokens, kept)

        place = destinations(kept, tokens.patches, rest=keep)  # (B, n), K: into the fused token
        lost = attention * (place == keep).astype(jnp.float32)  # (B, n), 0 for those kept
        if self.by != "class":
            lost = lost / jnp.maximum(jnp.sum(lost, axis=1, keepdims=True), TINY)
        reduced = drop(tokens, kept, fused=lost)
        size = jnp.sum((place == keep) * tokens.size[:, tokens.prefix :], axis=1)  # (B,)
        positions = reduced.positions
        if positions is not None:
            middle = self.middle(jax.lax.stop_gradient(lost), tokens.positions[:, tokens.prefix :])
            positions = jnp.concatenate([positions, middle[:, None]], axis=1)
        return reduced.replace(
            size=jnp.concatenate([reduced.size, size[:, None]], axis=1),
            owner=follow(tokens.owner, place),
            positions=positions,
            weight=None
            if reduced.weight is None
            else jnp.pad(reduced.weight, ((0, 0), (0, 1)), constant_values=1.0),
        )

    def middle(self, attention: jax.Array, positions: jax.Array) -> jax.Array:
        """Where the fused token is, by attention (B, n) to and positions (B, n, 2) of its parts.

        Returns:
          (B, 2) float32.
        """
        if self.fused_at == "strongest":
            index = jnp.argmax(attention, axis=1)[:, None, None]
            return jnp.take_along_axis(positions, index, axis=1)[:, 0]
        share = attention / jnp.maximum(jnp.sum(attention, axis=1, keepdims=True), TINY)
        return jnp.sum(share[..., None] * positions, axis=1)


REDUCER = EViT
