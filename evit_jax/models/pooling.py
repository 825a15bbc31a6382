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

    width: int
    num_heads: int
    hidden: int  # width of the MLP
    activation: str = "gelu"
    norm_kind: str = "layer"
    norm_eps: float = 1e-6
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        self.latent = self.param("latent", weight_init, (1, 1, self.width))
        self.q, self.proj = Affine(self.width), Affine(self.width)
        self.kv = Affine(2 * self.width)
        self.norm = norm(None, self.norm_kind, self.norm_eps)
        self.mlp = Mlp(self.hidden, dtype=self.dtype, activation=self.activation)

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
        kv = dense(x.astype(self.dtype), *self.layer(self.kv))
        kv = kv.reshape(batch, count, 2, self.num_heads, -1)
        logits = jnp.einsum("hc,bnhc->bhn", self.query(), kv[:, :, 0], preferred_element_type=F32)
        unscaled, total = softmax_weights(logits, size[:, None])
        attention = unscaled / total  # (B, H, n)
        y = jnp.einsum("bhn,bnhc->bhc", attention.astype(self.dtype), kv[:, :, 1])
        y = dense(y.reshape(batch, 1, width), *self.layer(self.proj))
        y = y + self.mlp(self.norm(y).astype(self.dtype), None)
        return y[:, 0], jnp.mean(attention, axis=1)

    def query(self) -> jax.Array:
        """(H, C) in the compute dtype, scaled."""
        q = dense(self.latent.astype(self.dtype), *self.layer(self.q)).reshape(self.num_heads, -1)
        return q * q.shape[-1] ** -0.5

    def asked(self) -> jax.Array:
        """(H, D) float32: the query as it asks tokens, up to a number that all of them share."""
        kernel, _ = self.kv(self.width)
        kernel = kernel[:, : self.width].reshape(self.width, self.num_heads, -1)
        return jnp.einsum("hc,dhc->hd", self.query().astype(F32), kernel)

    def layer(self, affine: Affine) -> tuple[jax.Array, jax.Array]:
        """Kernel and bias in the compute dtype."""
        kernel, bias = affine(self.width)
        return kernel.astype(self.dtype), bias.astype(self.dtype)
