# SPDX-License-Identifier: Apache-2.0
"""Rotary positions: queries and keys turned by angles that depend on where a token is.

Angles are functions of `Tokens.positions`, so they stay with the tokens however these are selected,
reordered or merged: a merged token is turned by the angles of its mean position, never by a mean of
sines. The three kinds and their settings are timm's (`layers/pos_embed_sincos.py`):

  "cat"     bands of a fixed temperature for rows and for columns (EVA-02, arXiv 2303.11331; with
            xy order PE, arXiv 2504.13181, and RoPE-ViT's axial kind, arXiv 2403.13298)
  "dinov3"  the same for coordinates from -1 to 1 over the image (arXiv 2508.10104)
  "mixed"   learned frequencies for every block and head (RoPE-ViT)

Letters: B images, N tokens, H heads, C width of one head.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

F32 = jnp.float32
KINDS = ("cat", "dinov3", "mixed")


@struct.dataclass
class Rotation:
    """Turns pairs of channels of x (B, H, N, C), each by its angle.

    The members of a pair come out half of the channels apart, wherever they were: queries and keys
    are reordered alike, which no product of theirs notices.

    cos, sin   (B or 1, H or 1, N or more, C / 2) float32.
    adjacent   static: pairs are channels 0 and 1, 2 and 3, ...; else they are C / 2 apart.
    """

    cos: jax.Array
    sin: jax.Array
    adjacent: bool = struct.field(pytree_node=False)

    def __call__(self, x: jax.Array) -> jax.Array:
        count, width = x.shape[2:]
        first, second = slice(0, width // 2), slice(width // 2, None)
        if self.adjacent:
            first, second = slice(0, None, 2), slice(1, None, 2)
        a, b = x[..., first].astype(F32), x[..., second].astype(F32)
        cos, sin = self.cos[:, :, :count], self.sin[:, :, :count]
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class Rotary:
    """What a model's rotary positions are made of; static."""

    kind: str  # one of KINDS
    grid: tuple[int, int]  # rows and columns of patches in an image
    temperature: float
    offset: float = 0.0  # added to every coordinate
    # Rows and columns that coordinates are stretched to, those of pretraining; None: as they are.
    reference: tuple[int, int] | None = None
    columns_first: bool = False  # "xy": the first bands are for columns, not for rows

    def rotation(
        self,
        positions: jax.Array,
        prefix: int,
        head_width: int,
        frequencies: jax.Array | None = None,
    ) -> Rotation:
        """The rotation of tokens at these positions, in float32.

        Args:
          positions: (B, N, 2) float32, row and column in patches.
          prefix: tokens at the front, which are not turned.
          head_width: C.
          frequencies: (2, H, C / 2) float32 of the kind "mixed", by coordinate in its order.
        """
        coordinates = self.coordinates(positions)  # (B, N, 2)
        if self.kind == "mixed":
            at = coordinates[:, None, :, :, None]  # (B, 1, N, 2, 1)
            angles = at[..., 0, :] * frequencies[None, 0, :, None]
            angles += at[..., 1, :] * frequencies[None, 1, :, None]  # (B, H, N, C / 2)
        else:
            bands = jnp.asarray(self.bands(head_width // 4))
            angles = coordinates[..., None] * bands[None, None, None]  # (B, N, 2, C / 4)
            angles = angles.reshape(*angles.shape[:2], -1)[:, None]
        patch = jnp.arange(positions.shape[1]) >= prefix
        angles = jnp.where(patch[None, None, :, None], angles, 0)
        return Rotation(jnp.cos(angles), jnp.sin(angles), adjacent=self.kind != "dinov3")

    def draw(self, key: jax.Array, shape: tuple[int, int, int]) -> jax.Array:
        """Frequencies of the kind "mixed" to start training from: (2, H, C / 2) float32.

        As RoPE-ViT does: pairs of orthogonal waves in a random direction for each head.
        """
        _, num_heads, count = shape
        directions = jax.random.uniform(key, (num_heads, 1), maxval=2 * math.pi)
        turned = jnp.concatenate([directions, directions + math.pi / 2], axis=1)[..., None]
        lengths = jnp.asarray(self.bands(count // 2))[None, None]
        waves = jnp.stack([jnp.cos(turned), jnp.sin(turned)]) * lengths[None]
        return waves.reshape(shape)

    def coordinates(self, positions: jax.Array) -> jax.Array:
        """Positions (B, N, 2) in the units and the order of the angles."""
        sizes = jnp.asarray(self.grid, F32)[None, None]
        at = positions + self.offset
        if self.kind == "dinov3":
            at = 2 * ((at + 0.5) / sizes) - 1
        elif self.reference is not None:
            at = at / sizes * jnp.asarray(self.reference, F32)[None, None]
        return at[..., ::-1] if self.columns_first else at

    def bands(self, count: int) -> np.ndarray:
        """Angles per unit of a coordinate: (count,) float32."""
        bands = np.float32(self.temperature) ** (-np.arange(count, dtype=np.float32) / count)
        return bands * np.float32(2 * math.pi) if self.kind == "dinov3" else bands
