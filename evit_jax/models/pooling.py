# SPDX-License-Identifier: Apache-2.0
"""From the patch tokens of the last block to one vector, where no class token is read.

Both kinds know how many patches a token stands for, so joining tokens that are equal changes
nothing. Letters: B images, n patch tokens, H heads, C width of one head, D width.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from evit_jax.models.layers import Affine, Mlp, dense, norm, weight_init
from evit_jax.tokens import F32, softmax_weights


def average(x: jax.Array, size: jax.Array) -> jax.Array:
    """Mean of tokens (B, n, D), each counted as `size` (B, n) patches -> (B, D) float32."""
    total = jnp.einsum("bnd,bn->bd", x.astype(F32), size, precision="highest")
    return total / jnp.sum(size, axis=1, keepdims=True)


class MapPool(nn.Module):
    """Multi-head attention pooling (Zhai et al. 2022, arXiv 2106.04560; SigLIP): one learned probe.

    The probe attends to the patch tokens, exp(logit) times their size; an MLP follows. The names
    are timm's: latent, q, kv, proj, norm, mlp.
    """

    num_heads: int
    hidden: int  # width of the MLP
    activation: str = "gelu"
    norm: str = "layer"
    norm_eps: float = 1e-6
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, size: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Pools.

        Args:
          x: (B, n, D).
          size: (B, n) float32, the patches in each token; what is of size 0 is not attended to.

        Returns:
          (B, D) in the compute dtype, and the probe's attention (B, n) float32, the mean over
          heads, which sums to 1.
        """
        batch, count, width = x.shape
        heads = self.num_heads, width // self.num_heads
        latent = self.param("latent", weight_init, (1, 1, width)).astype(self.dtype)

        def layer(name, features):
            kernel, bias = Affine(features, name=name)(width)
            return kernel.astype(self.dtype), bias.astype(self.dtype)

        q = dense(latent, *layer("q", width)).reshape(heads) * heads[1] ** -0.5
        kv = dense(x.astype(self.dtype), *layer("kv", 2 * width)).reshape(batch, count, 2, *heads)
        logits = jnp.einsum("hc,bnhc->bhn", q, kv[:, :, 0], preferred_element_type=F32)
        unscaled, total = softmax_weights(logits, size[:, None])
        attention = unscaled / total  # (B, H, n)
        y = jnp.einsum("bhn,bnhc->bhc", attention.astype(self.dtype), kv[:, :, 1])
        y = dense(y.reshape(batch, 1, width), *layer("proj", width))
        mlp = Mlp(self.hidden, dtype=self.dtype, activation=self.activation, name="mlp")
        y = y + mlp(norm("norm", self.norm, self.norm_eps)(y).astype(self.dtype), None)
        return y[:, 0], jnp.mean(attention, axis=1)
