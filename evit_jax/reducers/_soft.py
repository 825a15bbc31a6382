# SPDX-License-Identifier: Apache-2.0
"""What methods share whose tokens are each a mean of all patches.

Letters: B images, n patch tokens, K of them afterwards, D width.
"""

import jax
import jax.numpy as jnp

from evit_jax.tokens import F32, Tokens, follow


def mix(tokens: Tokens, share: jax.Array, values: jax.Array | None = None) -> Tokens:
    """Patch tokens become K weighted sums of all of them.

    Every new token stands for an equal part of the patches, and its weight and its position are
    means with its shares. A patch is owned by the token in which its share is largest.

    Args:
      share: (B, n, K) float32, of each sum 1 over n.
      values: (B, n, D) that are summed; default the tokens themselves.
    """
    prefix, dtype = tokens.prefix, tokens.x.dtype
    values = tokens.x[:, prefix:] if values is None else values

    def joined(front, back):
        return jnp.concatenate([front[:, :prefix], back.astype(front.dtype)], axis=1)

    def mean(values):  # (B, n, ...) -> (B, K, ...) float32
        return jnp.einsum("bnk,bn...->bk...", share, values.astype(F32))

    x = jnp.einsum(
        "bnk,bnd->bkd", share.astype(dtype), values.astype(dtype), preferred_element_type=F32
    )
    size = jnp.sum(tokens.size[:, prefix:], axis=1, keepdims=True) / share.shape[2]
    size = jnp.broadcast_to(size, (share.shape[0], share.shape[2]))
    weight, positions = tokens.weight, tokens.positions
    return tokens.replace(
        x=joined(tokens.x, x),
        size=joined(tokens.size, size),
        owner=follow(tokens.owner, jnp.argmax(share, axis=2).astype(jnp.int32)),
        weight=None if weight is None else joined(weight, mean(weight[:, prefix:])),
        positions=None if positions is None else joined(positions, mean(positions[:, prefix:])),
    )
