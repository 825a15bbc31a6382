# SPDX-License-Identifier: Apache-2.0
"""STViT: semantic tokens, which start as maxima of regions and gather from all patches.

Chang et al., "Making Vision Transformers Efficient from a Token Sparsification View" (CVPR 2023).
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from evit_jax.plan.counts import Entry
from evit_jax.reducers._soft import mix
from evit_jax.tokens import F32, Reducer, Signals, Tokens

LAYERS = 2  # of cross-attention, in each block that reduces


class STViT(nn.Module, Reducer):
    """K semantic tokens take the place of the patch tokens.

    They start as maxima, channel by channel, over K regions of the grid (`regions`), which also
    decide what patches they stand for. Then two layers, each
        s = s + a * attention(norm(s + c), norm([s; x]))      c in the second layer alone
        s = s + b * mlp(norm(s))
    with x the patch tokens, c (K, D) learned centers, heads of about 64 channels, and a and b
    learned for each channel, from 1e-5. So the parameters are for this plan's counts alone.

    The paper has code for Swin only; this is what it says of plain models, whose later blocks see
    semantic tokens alone: once, by default after a third of the blocks. It works before a block's
    attention, which is after the block before. Projections and MLP, about (10 K + 2 n) D^2 in a
    layer, are not in the counts of `plan.flops`, but pairs of tokens are. Tokens that are no whole
    grid any more are taken as one row.
    """

    one_plan = True
    site = "input"

    def default_layers(self, depth: int) -> tuple[int, ...]:
        return (depth // 3,)

    def matching_macs(self, n: int, keep: Entry, prefix: int, width: int, num_heads: int) -> int:
        return LAYERS * 2 * keep * (keep + n) * width

    @nn.compact
    def __call__(self, tokens: Tokens, signals: Signals, keep: Entry) -> Tokens:
        prefix, dtype, n = tokens.prefix, tokens.x.dtype, tokens.patches
        x, size = tokens.x[:, prefix:], tokens.size[:, prefix:]
        rows, columns = signals.grid if math.prod(signals.grid or ()) == n else (1, n)
        region = regions(rows, columns, keep)

        member = (region[:, None] == np.arange(keep))[None] * (size > 0)[..., None].astype(F32)
        count = jnp.sum(member, axis=1, keepdims=True)
        pooled = mix(tokens, member / jnp.maximum(count, 1))
        sizes = jnp.einsum("bnk,bn->bk", member, size)
        s = maxima(x, size > 0, region, keep)
        there = jnp.concatenate([sizes, size], axis=1) > 0
        for layer in range(LAYERS):
            s = Gather(centers=layer > 0, name=f"gather_{layer}")(s, x, there)
        return pooled.replace(
            x=jnp.concatenate([tokens.x[:, :prefix], s.astype(dtype)], axis=1),
            size=jnp.concatenate([tokens.size[:, :prefix], sizes], axis=1),
        )


class Gather(nn.Module):
    """One layer: semantic tokens attend to themselves and to the patches; then an MLP."""

    centers: bool

    @nn.compact
    def __call__(self, s: jax.Array, x: jax.Array, there: jax.Array) -> jax.Array:
        """s (B, K, D), x (B, n, D), there (B, K + n) bool: which keys are tokens -> (B, K, D)."""
        (batch, keep, width), dtype = s.shape, x.dtype
        heads = max(h for h in range(1, max(width // 64, 1) + 1) if width % h == 0)
        normal = nn.initializers.normal(0.02)

        def dense(features, name):
            return nn.Dense(features, dtype=dtype, kernel_init=normal, name=name)

        def norm(values, name):
            return nn.LayerNorm(dtype=F32, epsilon=1e-6, name=name)(values).astype(dtype)

        def split(values):  # (B, N, D) -> (B, N, H, C)
            return values.reshape(batch, -1, heads, width // heads)

        asking = s
        if self.centers:
            asking = s + self.param("centers", normal, (keep, width)).astype(dtype)[None]
        q = split(dense(width, "q")(norm(asking, "norm_q")))
        keys = norm(jnp.concatenate([s, x], axis=1), "norm_kv")
        k, v = map(split, jnp.split(dense(2 * width, "kv")(keys), 2, axis=-1))
        logits = jnp.einsum("bqhc,bkhc->bhqk", q, k, preferred_element_type=F32)
        logits = jnp.where(there[:, None, None], logits * (width // heads) ** -0.5, -jnp.inf)
        share = nn.softmax(logits).astype(dtype)
        y = jnp.einsum("bhqk,bkhc->bqhc", share, v).reshape(s.shape)
        s = s + self.scale("scale_1", width) * dense(width, "proj")(y)
        y = nn.gelu(dense(4 * width, "fc1")(norm(s, "norm_mlp")), approximate=False)
        return s + self.scale("scale_2", width) * dense(width, "fc2")(y)

    def scale(self, name: str, width: int) -> jax.Array:
        return self.param(name, nn.initializers.constant(1e-5), (width,))[None, None]


def regions(rows: int, columns: int, keep: int) -> np.ndarray:
    """(rows * columns,) ints below `keep`: which of so many about square regions each patch is in.

    Rows are split into bands and every band into columns, as evenly as they come; regions are
    numbered along the bands, so that semantic tokens are in the order of the grid as well.
    """
    bands = round(math.sqrt(keep * rows / columns))
    bands = min(max(bands, math.ceil(keep / columns), 1), rows, keep)
    # Where rows and regions do not divide, the same bands have one more of both.
    band = np.searchsorted(np.arange(1, bands + 1) * rows // bands, np.arange(rows), side="right")
    starts = np.arange(bands + 1) * keep // bands
    parts = np.diff(starts)[band]
    places = starts[band][:, None] + np.arange(columns) * parts[:, None] // columns
    return places.reshape(-1)


def maxima(x: jax.Array, there: jax.Array, region: np.ndarray, keep: int) -> jax.Array:
    """(B, keep, D): the largest value in each region and channel of x (B, n, D), 0 where none is.

    A gather of each region's members, which are known when the program is traced; the shorter
    regions have their first member several times.
    """
    members = [np.flatnonzero(region == i) for i in range(keep)]
    longest = max(map(len, members))
    index = np.stack([np.pad(m, (0, longest - len(m)), constant_values=m[0]) for m in members])
    there = there[:, index][..., None]
    largest = jnp.max(jnp.where(there, x[:, index], -jnp.inf), axis=2)
    return jnp.where(jnp.any(there, axis=2), largest, 0)


REDUCER = STViT
