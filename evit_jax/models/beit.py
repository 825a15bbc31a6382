# SPDX-License-Identifier: Apache-2.0
"""BEiT and BEiT v2 (arXiv 2106.08254, 2208.06366): a ViT with a bias by relative position.

What differs from `models.eva.Eva` is that positions add to the logits instead of turning queries
and keys (`models.relative`). The oracle is timm's `beit.py`.
"""

from typing import Any

from evit_jax.models.eva import Eva


class BEiT(Eva):
    """images (B, H, W, 3) -> (logits (B, num_classes) float32, out), see `ViT`."""

    absolute_positions: bool = False
    qkv_bias: bool | str = "qv"
    pool: str = "avg"

    def block_settings(self, number: int) -> dict[str, Any]:
        return super().block_settings(number) | dict(relative_grid=self.grid)


MODEL = BEiT  # what create_model("beit") builds
