# SPDX-License-Identifier: Apache-2.0
"""What methods that select patches share: how important a token is, read off the attention.

Letters: B images, n patch tokens, H heads.
"""

import jax
import jax.numpy as jnp

from evit_jax.errors import check_name
from evit_jax.plan.counts import Entry
from evit_jax.tokens import Reducer, Signals, Tokens


def value(signals: Signals) -> jax.Array:
    """(B, N) float32: L2 norm of each token's values, all heads as one vector."""
    return jnp.sqrt(jnp.sum(jnp.square(signals.value_norms()), axis=1))


def key_norm(signals: Signals) -> jax.Array:
    """(B, N) float32: L2 norm of each token's keys, all heads as one vector."""
    return jnp.sqrt(jnp.sum(jnp.square(signals.key_norms()), axis=1))


def class_value(signals: Signals) -> jax.Array:
    """(B, N) float32: class attention times the norm of the values, per head, then the mean.

    It is how much of a token arrives in the class token (ATS).
    """
    return jnp.mean(signals.class_rows() * signals.value_norms(), axis=1)


SCORES = {
    "class": Signals.class_attention,
    "class_value": class_value,
    "received": Signals.received_attention,
    "mean": Signals.mean_attention,
    "probe": Signals.probe_attention,
    "shift": Signals.shift,
    "key_norm": key_norm,
    "value": value,
}
OF_CLASS_TOKEN = ("class", "class_value")


class Ranks(Reducer):
    """Base of the methods that rank patches by a score, which their field `by` names."""

    by: str

    def __post_init__(self):
        check_name("score", self.by, SCORES)

    @property
    def reads_class_token(self) -> bool:
        return self.by in OF_CLASS_TOKEN

    def matching_macs(self, n: int, keep: Entry, prefix: int, width: int, num_heads: int) -> int:
        return map_macs(self.by, n, prefix, width)


def importance(by: str, tokens: Tokens, signals: Signals) -> jax.Array:
    """(B, n) float32 of the patch tokens, without a gradient: what is kept is a decision.

    Raises:
      InputError: the score needs a class token or map pooling, and the model has none.
    """
    return jax.lax.stop_gradient(SCORES[by](signals)[:, tokens.prefix :])


def best(scores: jax.Array, tokens: Tokens, count: int) -> jax.Array:
    """(B, count) int32: the patch tokens with the highest of the scores (B, n), in that order.

    Ties go to the lower index. Empty slots, which are of size 0, come after all others.
    """
    there = tokens.size[:, tokens.prefix :] > 0
    return jax.lax.top_k(jnp.where(there, scores, -jnp.inf), count)[1]


def map_macs(by: str, n: int, prefix: int, width: int) -> int:
    """Multiply-accumulates of the attention map, where a score needs all of it."""
    return (prefix + n) ** 2 * width if by == "received" else 0
