# SPDX-License-Identifier: Apache-2.0
"""T2T-ViT (Yuan et al. 2021, arXiv 2101.11986): overlapping windows become patches in three steps.

Before the blocks of a ViT without biases of queries, keys and values, "tokens to token" takes
windows of 7x7 pixels at a stride of 4, lets all of them attend to each other in a narrow layer, and
twice takes windows of 3x3 of these tokens at a stride of 2, with a second such layer in between.
The layers are transformers, or performers, whose cost is linear in the number of tokens. Positions
are fixed sinusoids. The oracle is the authors' models/t2t_vit.py, as they evaluate it: attention of
the blocks is scaled by the heads' width.

Letters: B images, N tokens, E width of a window, T width of a token in between, M random features.
"""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from evit_jax.errors import InputError, check_name
from evit_jax.models.attention import attend
from evit_jax.models.layers import Mlp, dropout, fold, gelu, norm, weight_init
from evit_jax.models.vit import ViT
from evit_jax.runtime.forms import by_chip
from evit_jax.tokens import F32

WINDOWS = ((7, 4, 2), (3, 2, 1), (3, 2, 1))  # window, stride and padding of the three steps
EPS = 1e-5  # of the norms
PERFORMER_DROPOUT = 0.1  # while training, whatever that of the blocks is


def windows(x: jax.Array, window: int, stride: int, padding: int) -> jax.Array:
    """x (B, H, W, C) -> (B, H', W', C * window * window), channels slowest, as PyTorch's unfold."""
    return jax.lax.conv_general_dilated_patches(
        x,
        (window, window),
        (stride, stride),
        ((padding, padding), (padding, padding)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=jax.lax.Precision.HIGHEST,  # it moves numbers, and is to round none
    )


class Transformer(nn.Module):
    """A layer of attention with one head that narrows its tokens: (B, N, E) -> (B, N, T).

    They have another width afterwards, so values take the place of the residual.
    """

    width: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, rngs: jax.Array | None) -> jax.Array:
        del rngs
        scale = x.shape[-1] ** -0.5  # of what enters, wide as it is
        x = norm("norm1", eps=EPS)(x).astype(self.dtype)
        x = Attention(self.width, scale, self.dtype, name="attn")(x)
        mlp = Mlp(self.width, dtype=self.dtype, name="mlp")
        return x + mlp(norm("norm2", eps=EPS)(x).astype(self.dtype), None)


class Attention(nn.Module):
    """Attention of one head, with its values added: (B, N, E) -> (B, N, T)."""

    width: int
    scale: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        layer = functools.partial(nn.Dense, kernel_init=weight_init, dtype=self.dtype)
        q, k, v = jnp.split(layer(3 * self.width, use_bias=False, name="qkv")(x), 3, axis=-1)
        q, k, v = (part[:, None] for part in (q * self.scale, k, v))
        y = by_chip(attend, q, k, v, dtype=self.dtype)[:, 0].astype(self.dtype)
        return v[:, 0] + layer(self.width, name="proj")(y)


class Performer(nn.Module):
    """The same with attention by positive random features (arXiv 2009.14794), linear in N.

    exp(q k) is the mean of phi(q) phi(k) over features phi(x) = exp(w x - |x|^2 / 2) of random w,
    which are fixed and kept among the parameters.
    """

    width: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, rngs: jax.Array | None) -> jax.Array:
        layer = functools.partial(nn.Dense, kernel_init=weight_init, dtype=self.dtype)
        x = norm("norm1", eps=EPS)(x).astype(self.dtype)
        k, q, v = jnp.split(layer(3 * self.width, name="kqv")(x), 3, axis=-1)
        features = self.width // 2
        w = jax.lax.stop_gradient(self.param("w", orthogonal, (features, self.width)))

        def phi(x):
            x = x.astype(F32)
            logits = jnp.einsum("bnt,mt->bnm", x, w) - jnp.sum(x * x, axis=-1, keepdims=True) / 2
            return jnp.exp(logits) * features**-0.5

        q, k = phi(q), phi(k)
        total = jnp.einsum("bnm,bm->bn", q, jnp.sum(k, axis=1))[..., None]
        y = jnp.einsum("bnm,bmt->bnt", q, jnp.einsum("bnm,bnt->bmt", k, v.astype(F32)))
        y = (y / (total + 1e-8)).astype(self.dtype)
        x = v + dropout(layer(self.width, name="proj")(y), PERFORMER_DROPOUT, fold(rngs, 0))
        y = layer(self.width, name="mlp_0")(norm("norm2", eps=EPS)(x).astype(self.dtype))
        y = layer(self.width, name="mlp_2")(gelu(y))
        return x + dropout(y, PERFORMER_DROPOUT, fold(rngs, 1))


def orthogonal(key: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """Random rows (M, T), orthogonal to each other and of length sqrt(M)."""
    return nn.initializers.orthogonal(shape[0] ** 0.5)(key, shape)


LAYERS = dict(performer=Performer, transformer=Transformer)


class TokensToToken(nn.Module):
    """Images (B, H, W, 3) -> patches (B, P, D)."""

    width: int
    kind: str  # of the layers, one of LAYERS
    token_width: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, images: jax.Array, rngs: jax.Array | None) -> jax.Array:
        x = windows(images.astype(self.dtype), *WINDOWS[0])
        for step, window in enumerate(WINDOWS[1:], start=1):
            batch, rows, columns, entering = x.shape
            layer = LAYERS[self.kind](self.token_width, self.dtype, name=f"attention{step}")
            x = layer(x.reshape(batch, rows * columns, entering), fold(rngs, step))
            x = windows(x.reshape(batch, rows, columns, -1), *window)
        x = x.reshape(batch, -1, x.shape[-1])
        project = functools.partial(nn.Dense, kernel_init=weight_init, dtype=self.dtype)
        return project(self.width, name="project")(x)


def sinusoids(count: int, width: int) -> np.ndarray:
    """(1, count, width) float32: sines in even columns, cosines in odd ones, of slowing waves."""
    columns = np.arange(width)
    angles = np.arange(count)[:, None] / 10000 ** (2 * (columns // 2) / width)[None]
    return np.where(columns % 2, np.cos(angles), np.sin(angles)).astype(np.float32)[None]


class T2TViT(ViT):
    """images (B, H, W, 3) -> (logits (B, num_classes) float32, out), see `ViT`."""

    mlp_ratio: float = 3.0
    norm_eps: float = EPS
    qkv_bias: bool | str = False
    token_layer: str = "performer"  # or "transformer", of tokens to token
    token_width: int = 64

    @property
    def stem_macs(self) -> int:
        total, (height, width), entering = 0, self.image_size, 3 * WINDOWS[0][0] ** 2
        narrow, features = self.token_width, self.token_width // 2
        for _, stride, _ in WINDOWS[:2]:
            height, width = height // stride, width // stride
            count = height * width
            attention = 4 * features * narrow + features
            if self.token_layer == "transformer":
                attention = 2 * count * narrow
            total += count * (3 * entering * narrow + attention + 3 * narrow**2)
            entering = WINDOWS[1][0] ** 2 * narrow
        return total + self.patches * entering * self.width

    def check(self) -> None:
        """As `Backbone.check`, and what tokens to token can make."""
        super().check()
        check_name("token_layer", self.token_layer, LAYERS)
        side = math.prod(stride for _, stride, _ in WINDOWS)
        if self.patch_size != (side, side):
            raise InputError(f"T2T-ViT's patch_size is {side}, got {self.patch_size}")
        if type(self.token_width) is not int or self.token_width < 2:
            raise InputError(
                f"token_width must be a whole number from 2 up, got {self.token_width}"
            )

    def stem(
        self, images: jax.Array, train: bool, rngs: jax.Array | None
    ) -> tuple[jax.Array, dict]:
        del train
        module = nn.remat(TokensToToken) if self.remat else TokensToToken
        sizes = self.width, self.token_layer, self.token_width
        return module(*sizes, self.dtype, name="tokens_to_token")(images, rngs), {}

    def positions(self) -> jax.Array:
        def init(key, shape):
            return jnp.asarray(sinusoids(*shape[1:]))

        shape = 1, self.placed_prefix + self.patches, self.width
        return jax.lax.stop_gradient(self.param("pos_embed", init, shape))


def published(
    width: int, depth: int, parameters: int, *, mlp_ratio: float = 3.0, layer: str = "performer"
) -> dict[str, Any]:
    """An entry of VARIANTS in the form of names.json."""
    settings = dict(width=width, depth=depth, num_heads=width // 64, mlp_ratio=mlp_ratio)
    settings |= dict(token_layer=layer, position_resize="bicubic")
    card = dict(crop=0.9, interpolation="bicubic", statistics="imagenet")
    return dict(settings=settings, parameters=parameters, tags={"": card})


# The authors' models, which are not timm's; parameters with the fixed ones, as they count.
VARIANTS = dict(
    t2t_vit_7=published(256, 7, 4_310_222, mlp_ratio=2.0),
    t2t_vit_10=published(256, 10, 5_889_230, mlp_ratio=2.0),
    t2t_vit_12=published(256, 12, 6_941_902, mlp_ratio=2.0),
    t2t_vit_14=published(384, 14, 21_545_550),
    t2t_vit_19=published(448, 19, 39_177_422),
    t2t_vit_24=published(512, 24, 64_105_934),
    t2t_vit_t_14=published(384, 14, 21_541_070, layer="transformer"),
    t2t_vit_t_19=published(448, 19, 39_172_942, layer="transformer"),
    t2t_vit_t_24=published(512, 24, 64_101_454, layer="transformer"),
)
MODEL = T2TViT  # what create_model("t2t") builds
