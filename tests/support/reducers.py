# SPDX-License-Identifier: Apache-2.0
"""Small methods that use each part of the seam once; the contract tests hold for them too."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from evit_jax.tokens import Reducer, Signals, Tokens, destinations, drop, follow


class Predictor(nn.Module, Reducer):
    """Keeps the tokens with the highest learned score, and reports a loss: one with parameters.

    In training it keeps all of them and hides the others by a straight-through mask.
    """

    hidden: int = 4

    @nn.compact
    def __call__(self, tokens: Tokens, signals: Signals, keep: int) -> Tokens:
        patches = tokens.x[:, tokens.prefix :].astype(jnp.float32)
        scores = nn.Dense(1, name="out")(nn.gelu(nn.Dense(self.hidden, name="in")(patches)))
        scores = jax.nn.sigmoid(scores[..., 0])  # (B, n)
        tokens = tokens.report(loss=(scores.mean(axis=1) - keep / patches.shape[1]) ** 2)
        chosen, kept = jax.lax.top_k(scores, keep)
        if not signals.train:
            return drop(tokens, kept)
        hard = (scores >= chosen[:, -1:]).astype(jnp.float32)
        mask = hard + scores - jax.lax.stop_gradient(scores)
        mask = jnp.pad(mask, ((0, 0), (tokens.prefix, 0)), constant_values=1.0)
        return tokens.replace(weight=mask if tokens.weight is None else mask * tokens.weight)


@dataclasses.dataclass(frozen=True)
class AtInput(Reducer):
    """Keeps what the block before attended to: one that works before attention."""

    site = "input"

    def __call__(self, tokens: Tokens, signals: Signals, keep: int) -> Tokens:
        scores = signals.received_attention()[:, tokens.prefix :]
        return drop(tokens, jax.lax.top_k(scores, keep)[1])


@dataclasses.dataclass(frozen=True)
class AtOutput(Reducer):
    """Keeps what moved least over all blocks: one that works after the encoder."""

    site = "output"

    def __call__(self, tokens: Tokens, signals: Signals, keep: int) -> Tokens:
        blocks = signals.blocks or (signals,)
        scores = -sum(block.shift()[:, tokens.prefix :] for block in blocks)
        return drop(tokens, jax.lax.top_k(scores, keep)[1])


@dataclasses.dataclass(frozen=True)
class Slots(Reducer):
    """K slots, of which those below the mean attention stay empty: one with a count per image."""

    def __call__(self, tokens: Tokens, signals: Signals, keep: int) -> Tokens:
        attention = signals.class_attention()[:, tokens.prefix :]  # (B, n)
        values, kept = jax.lax.top_k(attention, keep)
        full = values >= attention.mean(axis=1, keepdims=True)  # (B, K)
        reduced = drop(tokens, kept)
        there = jnp.pad(full, ((0, 0), (tokens.prefix, 0)), constant_values=True)
        weight = jnp.ones_like(reduced.size) if reduced.weight is None else reduced.weight
        place = destinations(kept, tokens.patches, rest=-1)  # (B, n)
        lost = (place >= 0) & ~jnp.take_along_axis(full, jnp.maximum(place, 0), axis=1)
        return reduced.replace(
            x=jnp.where(there[..., None], reduced.x, 0),
            size=reduced.size * there,
            weight=weight * there,
            owner=follow(tokens.owner, jnp.where(lost, -1, place)),
        )


@dataclasses.dataclass(frozen=True)
class TwoSteps(Reducer):
    """Prunes to one count and then averages pairs down to another: one with two counts a block."""

    def __call__(self, tokens: Tokens, signals: Signals, keep: tuple[int, int] | int) -> Tokens:
        prune_to, merge_to = keep if isinstance(keep, tuple) else (tokens.patches, keep)
        scores = signals.class_attention()[:, tokens.prefix :]
        tokens = drop(tokens, jax.lax.top_k(scores, prune_to)[1])
        for _ in range(prune_to - merge_to):  # the last two become one
            tokens = self.join_last(tokens)
        return tokens

    def join_last(self, tokens: Tokens) -> Tokens:
        size = tokens.size[:, -2:]
        x = jnp.einsum("bnd,bn->bd", tokens.x[:, -2:], size / size.sum(axis=1, keepdims=True))
        place = jnp.minimum(jnp.arange(tokens.patches), tokens.patches - 2)[None]
        return tokens.replace(
            x=tokens.x[:, :-1].at[:, -1].set(x),
            size=tokens.size[:, :-1].at[:, -1].set(size.sum(axis=1)),
            weight=None if tokens.weight is None else tokens.weight[:, :-1],
            owner=follow(tokens.owner, jnp.broadcast_to(place, (x.shape[0], tokens.patches))),
        )


THROWN_IN = (Predictor(), AtInput(), AtOutput(), Slots(), TwoSteps())
