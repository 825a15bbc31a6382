# SPDX-License-Identifier: Apache-2.0
"""The small parts of a Vision Transformer: norm, activations, dropout, LayerScale, MLPs.

Parameters are float32; `dtype` is the compute dtype; norms run in float32.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from evit_jax.runtime.forms import EXACT, Form, by_chip

# DeiT draws weights from a normal truncated at an absolute value of 2, which at this width never
# truncates, and leaves biases at zero.
weight_init = nn.initializers.normal(0.02)


@jax.checkpoint
def gelu(x: jax.Array) -> jax.Array:
    """GELU, x * Phi(x). For the backward pass only x is stored, and the rest redone."""
    return by_chip(gelu_of, x, dtype=x.dtype)


def gelu_of(x: jax.Array, form: Form = EXACT) -> jax.Array:
    """GELU in the form of a chip."""
    if form.tanh_gelu:
        return nn.gelu(x, approximate=True)
    return 0.5 * x * (1 + jax.lax.erf(x * 0.5**0.5))


def gelu_then_dense(
    x: jax.Array, kernel: jax.Array, bias: jax.Array | None, form: Form = EXACT
) -> jax.Array:
    """GELU of x (B, N, E), then a dense layer (E, D) and (D,) or None -> (B, N, D)."""

    def both(x, kernel, bias):
        return dense(gelu_of(x, form), kernel, bias)

    if form.redo_gelu:  # in the backward pass, instead of storing what enters the product
        return jax.checkpoint(both)(x, kernel, bias)
    return dense(gelu(x), kernel, bias)


def dense(x: jax.Array, kernel: jax.Array, bias: jax.Array | None) -> jax.Array:
    """A dense layer of x (B, N, E) with a kernel (E, D) and a bias (D,) or None -> (B, N, D)."""
    y = x @ kernel
    return y if bias is None else y + bias[None, None]


ACTIVATIONS = {
    "gelu": gelu,
    "gelu_tanh": functools.partial(nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),  # CLIP's
    "silu": nn.silu,
}


def norm(name: str | None, kind: str = "layer", eps: float = 1e-6) -> nn.Module:
    """The norm module of a kind, "layer" or "rms", computed and returned in float32."""
    module = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}[kind]
    return module(epsilon=eps, dtype=jnp.float32, name=name)


def fold(rngs: jax.Array | None, number: int) -> jax.Array | None:
    """Random keys (B,), one per image -> others for another purpose; None stays None."""
    return None if rngs is None else jax.vmap(jax.random.fold_in, (0, None))(rngs, number)


def dropout(x: jax.Array, rate: float, rngs: jax.Array | None, *, whole: bool = False) -> jax.Array:
    """Zeroes values of x (B, N, D) at this rate and rescales the others.

    Args:
      x: any float dtype, returned as such.
      rate: in [0, 1).
      rngs: (B,) one random key per image, so that an image's draws are the same however a batch is
        split over devices or micro-batches; None changes nothing.
      whole: zero all of an image's values or none (stochastic depth of a residual branch).
    """
    if rngs is None or not rate:
        return x
    shape = (1, 1) if whole else x.shape[1:]
    kept = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, shape))(rngs)
    return jnp.where(kept, x / (1 - rate), jnp.zeros((), x.dtype))


class LayerScale(nn.Module):
    """Times a learned number per channel: x (B, N, D) -> (B, N, D), in its dtype."""

    initial: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        initial = nn.initializers.constant(self.initial)
        return x * self.param("gamma", initial, x.shape[-1:]).astype(x.dtype)[None, None]


class Affine(nn.Module):
    """The parameters of a dense layer, for products that are not x @ kernel + bias."""

    features: int
    use_bias: bool = True
    kernel_init: nn.initializers.Initializer = weight_init
    bias_init: nn.initializers.Initializer = nn.initializers.zeros_init()

    @nn.compact
    def __call__(self, width: int) -> tuple[jax.Array, jax.Array | None]:
        """Kernel (width, features) and bias (features,), float32; no bias is None."""
        kernel = self.param("kernel", self.kernel_init, (width, self.features))
        bias = self.param("bias", self.bias_init, (self.features,)) if self.use_bias else None
        return kernel, bias


def embed_patches(
    images: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None,
    patch_size: tuple[int, int],
    form: Form = EXACT,
) -> jax.Array:
    """A linear layer of every patch: a convolution whose stride is its size.

    Args:
      images: (B, H, W, C), images in float32 or what convolutions made of them.
      kernel, bias: (h * w * C, D) and (D,) or None, in the dtype of the computation.
      patch_size: (h, w), of which H and W are multiples.

    Returns:
      (B, P, D) in the dtype of the kernel, patches in row-major order.
    """
    batch, height, width, channels = images.shape
    high, wide = patch_size
    rows, columns = height // high, width // wide
    if form.convolve:
        # Images stay in float32, which the convolution reads where it lies: the products are
        # rounded to bfloat16 as they enter the matrix unit either way, and a copy costs more.
        windows = kernel.astype(images.dtype).reshape(high, wide, channels, -1)
        layout = ("NHWC", "HWIO", "NHWC")
        x = jax.lax.conv_general_dilated(
            images, windows, patch_size, "VALID", dimension_numbers=layout
        )
        if bias is not None:
            x = x + bias.astype(x.dtype)[None, None, None]
        return x.astype(kernel.dtype).reshape(batch, rows * columns, -1)
    patches = images.astype(kernel.dtype).reshape(batch, rows, high, columns, wide, -1)
    patches = patches.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows * columns, -1)
    return dense(patches, kernel, bias)


class Mlp(nn.Module):
    """Two dense layers with an activation between them, which may gate (SwiGLU).

    kind             leaves of the first layer, and what enters the second
    "plain"          fc1: act(fc1 x)
    "swiglu"         fc1_g, fc1_x: act(fc1_g x) * fc1_x x
    "swiglu_packed"  fc1, twice as wide: act(its first half) * its second half
    """

    hidden: int  # width of what enters the second layer
    dropout_rate: float = 0.0
    dtype: jnp.dtype = jnp.float32
    kind: str = "plain"
    activation: str = "gelu"
    use_bias: bool = True
    inner_norm: bool = False  # of what enters the second layer (BEiT-3, EVA-02)
    norm: str = "layer"
    norm_eps: float = 1e-6

    @nn.compact
    def __call__(self, x: jax.Array, rngs: jax.Array | None) -> jax.Array:
        first = functools.partial(
            nn.Dense, kernel_init=weight_init, use_bias=self.use_bias, dtype=self.dtype
        )
        act = ACTIVATIONS[self.activation]
        if self.kind == "swiglu":
            gate, y = first(self.hidden, name="fc1_g")(x), first(self.hidden, name="fc1_x")(x)
            y = act(gate) * y
        elif self.kind == "swiglu_packed":
            gate, y = jnp.split(first(2 * self.hidden, name="fc1")(x), 2, axis=-1)
            y = act(gate) * y
        else:
            y = first(self.hidden, name="fc1")(x)

        layer = Affine(x.shape[-1], self.use_bias, name="fc2")(self.hidden)
        kernel, bias = jax.tree.map(lambda a: a.astype(self.dtype), layer)
        drops = rngs is not None and self.dropout_rate
        if self.kind == "plain" and self.activation == "gelu" and not (drops or self.inner_norm):
            return by_chip(gelu_then_dense, y, kernel, bias, dtype=self.dtype)
        if self.kind == "plain":
            y = act(y)
        y = dropout(y, self.dropout_rate, fold(rngs, 0))
        if self.inner_norm:
            y = norm("norm", self.norm, self.norm_eps)(y).astype(self.dtype)
        return dropout(dense(y, kernel, bias), self.dropout_rate, fold(rngs, 1))
