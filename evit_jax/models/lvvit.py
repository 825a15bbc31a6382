# SPDX-License-Identifier: Apache-2.0
"""LV-ViT (Jiang et al. 2021, arXiv 2104.10858): convolutions before the blocks, labels for patches.

What differs from DeiT: four convolutions with batch norms embed the patches, residual branches are
divided by a number ("skip_lam"), queries, keys and values have no bias, and a second head,
`head_aux`, classifies every patch token, see `patch_logits` in `models.vit.ViT`. The oracle is the
authors' tlt/models/lvvit.py.

Letters: B images, P patches, D width, F filters.
"""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from evit_jax.errors import InputError
from evit_jax.models.layers import embed_patches
from evit_jax.models.vit import ViT
from evit_jax.runtime.forms import by_chip

CONVOLUTIONS = ((7, 2), (3, 1), (3, 1))  # window and stride; then one whose window is its stride
MOMENTUM = 0.9  # of running statistics; PyTorch calls it 0.1


class Convolution(nn.Module):
    """A convolution's parameters, randomly initialized as PyTorch does it."""

    shape: tuple[int, int, int, int]  # height, width, channels in and out
    use_bias: bool = False

    @nn.compact
    def __call__(self) -> tuple[jax.Array, jax.Array | None]:
        """Kernel of `shape` and bias (out,), float32; no bias is None."""
        bound = math.prod(self.shape[:-1]) ** -0.5
        init = functools.partial(jax.random.uniform, minval=-bound, maxval=bound)
        kernel = self.param("kernel", init, self.shape)
        return kernel, self.param("bias", init, self.shape[-1:]) if self.use_bias else None


class BatchNorm(nn.Module):
    """Batch norm as PyTorch has it, running statistics among the parameters.

    They are used, as part of the convolution before, where the model is not training; training
    normalizes by the statistics of the batch at hand, all of it where one program sees all of it.
    """

    features: int
    eps: float = 1e-5

    def setup(self):
        shape = (self.features,)
        self.scale = self.param("scale", nn.initializers.ones, shape)
        self.bias = self.param("bias", nn.initializers.zeros, shape)
        self.mean = self.param("mean", nn.initializers.zeros, shape)
        self.var = self.param("var", nn.initializers.ones, shape)

    def folded(self, kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Of a kernel (h, w, in, features) with this norm after it: kernel and bias of both."""
        gain = self.scale * jax.lax.rsqrt(self.var + self.eps)
        return kernel * gain[None, None, None], self.bias - self.mean * gain

    def normalize(self, x: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """x (B, H, W, features) by its own statistics, float32, and the new running ones."""
        x = x.astype(jnp.float32)
        mean, var = (f(x, axis=(0, 1, 2)) for f in (jnp.mean, jnp.var))
        gain = self.scale * jax.lax.rsqrt(var + self.eps)
        count = math.prod(x.shape[:3])
        seen = dict(mean=mean, var=var * (count / max(count - 1, 1)))
        running = {
            name: MOMENTUM * getattr(self, name) + (1 - MOMENTUM) * value
            for name, value in seen.items()
        }
        y = (x - mean[None, None, None]) * gain[None, None, None] + self.bias[None, None, None]
        return y, jax.lax.stop_gradient(running)


class ConvStem(nn.Module):
    """Images (B, H, W, 3) -> patches (B, P, D): three convolutions with batch norm and ReLU, then
    one of windows side by side, half of a patch wide, as the first halves the image."""

    width: int
    filters: int
    patch_size: tuple[int, int]
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> tuple[jax.Array, dict[str, Any]]:
        """The patches in the compute dtype and, of a training model, new running statistics."""
        x, statistics = images.astype(self.dtype), {}
        for number, (window, stride) in enumerate(CONVOLUTIONS, start=1):
            shape = (window, window, x.shape[-1], self.filters)
            kernel, _ = Convolution(shape, name=f"conv{number}")()
            norm = BatchNorm(self.filters, name=f"bn{number}")
            if train:
                x, statistics[f"bn{number}"] = norm.normalize(convolve(x, kernel, stride))
            else:
                kernel, bias = norm.folded(kernel)
                x = convolve(x, kernel, stride)
                x = x + bias.astype(x.dtype)[None, None, None]
            x = nn.relu(x).astype(self.dtype)
        high, wide = (side // 2 for side in self.patch_size)
        shape = (high, wide, self.filters, self.width)
        kernel, bias = Convolution(shape, use_bias=True, name="proj")()
        kernel = kernel.reshape(-1, self.width).astype(self.dtype)

        def patches(x, kernel, bias, form):
            return embed_patches(x, kernel, bias, (high, wide), form)

        return by_chip(patches, x, kernel, bias.astype(self.dtype), dtype=self.dtype), statistics


def convolve(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """x (B, H, W, in) with a kernel (w, w, in, out), padded by w // 2, in the dtype of x."""
    padding = ((kernel.shape[0] // 2,) * 2,) * 2
    layout = ("NHWC", "HWIO", "NHWC")
    kernel = kernel.astype(x.dtype)
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), padding, dimension_numbers=layout
    )


class LVViT(ViT):
    """images (B, H, W, 3) -> (logits (B, num_classes) float32, out), see `ViT`."""

    mlp_ratio: float = 3.0
    norm_eps: float = 1e-5
    qkv_bias: bool | str = False
    patch_head: bool = True
    filters: int = 64  # of the convolutions that embed patches
    branch_scale: float = 1.0  # what residual branches are multiplied with: 1 / "skip_lam"

    @property
    def batch_norm(self) -> bool:
        return True

    @property
    def stem_macs(self) -> int:
        channels = 3, self.filters, self.filters
        convolutions = zip(CONVOLUTIONS, channels, strict=True)
        inputs = sum(window**2 * entering for (window, _), entering in convolutions)
        # The last convolution's windows do not overlap: it reads every place once.
        return math.prod(self.image_size) // 4 * self.filters * (inputs + self.width)

    def check(self) -> None:
        """As `Backbone.check`, and that patches divide into the stem's windows."""
        super().check()
        if any(side % 2 for side in self.patch_size):
            raise InputError(f"LV-ViT's patch_size must be even, got {self.patch_size}")
        if type(self.filters) is not int or self.filters < 1:
            raise InputError(f"filters must be a whole number from 1 up, got {self.filters}")

    def block_settings(self, number: int) -> dict[str, Any]:
        return super().block_settings(number) | dict(branch_scale=self.branch_scale)

    def stem(self, images: jax.Array, train: bool) -> tuple[jax.Array, dict]:
        module = nn.remat(ConvStem, static_argnums=(2,)) if self.remat else ConvStem
        stem = module(self.width, self.filters, self.patch_size, self.dtype, name="patch_embed")
        x, statistics = stem(images, train)
        return x, dict(patch_embed=statistics) if train else {}


def published(*, parameters: int, crop: float, **settings) -> dict[str, Any]:
    """An entry of VARIANTS in the form of names.json."""
    card = dict(crop=crop, interpolation="bicubic", statistics="imagenet")
    settings |= dict(position_resize="bicubic")
    return dict(settings=settings, parameters=parameters, tags={"": card})


# The authors' models, which are not timm's; parameters are counted without running statistics.
VARIANTS = dict(
    lvvit_t=published(width=240, depth=12, num_heads=4, crop=0.9, parameters=8_534_720),
    lvvit_s=published(
        width=384, depth=16, num_heads=6, branch_scale=1 / 2, crop=0.9, parameters=26_151_824
    ),
    lvvit_m=published(
        width=512, depth=20, num_heads=8, branch_scale=1 / 2, crop=1.0, parameters=55_830_544
    ),
    lvvit_l=published(
        width=768,
        depth=24,
        num_heads=12,
        branch_scale=1 / 3,
        filters=128,
        image_size=448,
        crop=1.0,
        parameters=150_473_552,
    ),
)
MODEL = LVViT  # what create_model("lvvit") builds
