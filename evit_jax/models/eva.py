# SPDX-License-Identifier: Apache-2.0
"""Vision Transformers that know where tokens are: EVA, EVA-02, DINOv3, RoPE-ViT, PE.

The model is `models.vit.ViT` with timm's `eva.py` as the oracle; what is added is that its tokens
carry positions, by which attention turns queries and keys (`models.rotary`).
"""

from typing import Any

import jax
import jax.numpy as jnp

from evit_jax.errors import InputError, check_name
from evit_jax.models.rotary import KINDS, Rotary
from evit_jax.models.vit import ViT
from evit_jax.tokens import Tokens


class Eva(ViT):
    """images (B, H, W, 3) -> (logits (B, num_classes) float32, out), see `ViT`."""

    position_resize: str = "bicubic_antialias"
    mlp_norm: bool = False  # the inner norm of the MLP alone (EVA-02)
    rope: str = "none"  # or a kind of `models.rotary`: "cat", "dinov3", "mixed"
    rope_temperature: float = 10000.0
    rope_grid: str = "ij"  # rows before columns; or "xy"
    rope_offset: float = 0.0  # added to rows and columns
    rope_reference: tuple[int, int] | None = None  # rows and columns that others are stretched to

    @property
    def rotary(self) -> Rotary | None:
        """What rotary positions are made of; None: there are none."""
        if self.rope == "none":
            return None
        return Rotary(
            kind=self.rope,
            grid=self.grid,
            temperature=self.rope_temperature,
            offset=self.rope_offset,
            reference=self.rope_reference,
            columns_first=self.rope_grid == "xy",
        )

    def check(self) -> None:
        """As `Backbone.check`, and of what rotary positions need."""
        super().check()
        check_name("rope", self.rope, ("none", *KINDS))
        check_name("rope_grid", self.rope_grid, ("ij", "xy"))
        if self.rope != "none" and self.width // self.num_heads % 4:
            raise InputError(
                f"rotary positions need heads whose width is a multiple of 4, got {self.width} in "
                f"{self.num_heads} heads"
            )

    def block_settings(self, number: int) -> dict[str, Any]:
        more = dict(mlp_norm=self.mlp_norm, rotary=self.rotary, flat_layer_scale=True)
        return super().block_settings(number) | more

    def embed(self, x: jax.Array, rngs: jax.Array | None) -> Tokens:
        """Tokens as of `ViT`, with the positions of their patches."""
        tokens = super().embed(x, rngs)
        rows, columns = jnp.divmod(jnp.arange(self.patches), self.grid[1])
        at = jnp.stack([rows, columns], axis=-1).astype(jnp.float32)
        at = jnp.pad(at, ((self.prefix, 0), (0, 0)))
        # Of one image for all: no block computes angles or a bias per image before it has to.
        return tokens.replace(positions=at[None])


MODEL = Eva  # what create_model("eva") builds
