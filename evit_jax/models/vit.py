# SPDX-License-Identifier: Apache-2.0
"""The Vision Transformer (ViT, DeiT, distilled DeiT) with a token reducer in its blocks.

Letters: B images, P original patches, N tokens, D width.
"""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from evit_jax.models.backbone import Backbone
from evit_jax.models.block import Block, reduce
from evit_jax.models.layers import Affine, dropout, embed_patches, fold, norm, weight_init
from evit_jax.runtime.forms import by_chip
from evit_jax.tokens import Signals, Tokens


class ViT(Backbone):
    """images (B, H, W, 3) -> (logits (B, num_classes) float32, out).

    `out` holds what a user may want besides; jit removes what is not returned from it:
      owner          one (B, P) int32 per block that reduced, see `tokens.Tokens`
      cls_attention  one (B, N) float32 per block: the class token's attention, mean over heads
      blocks         one (B, N, D) per block: the tokens after it
      size           (B, N) float32: original patches inside each final token
      aux            name -> what reducing blocks reported, see `Tokens.report`
      features       (B, prefix, D) float32: the prefix tokens after the last norm
      logits_dist    (B, num_classes) float32, distilled models only: the distillation head, while
      logits_cls     (B, num_classes) float32 is the class head; `logits` is their mean
    """

    distilled: bool = False  # a second prefix token with a head of its own

    @property
    def prefix(self) -> int:
        """Tokens in front of the patches, never reduced: class and distillation token."""
        return 1 + self.distilled

    @property
    def head_macs(self) -> int:
        """Multiply-accumulates of one image's classifiers."""
        return (1 + self.distilled) * self.width * self.num_classes

    @nn.compact
    def __call__(
        self, images: jax.Array, *, train: bool = False, index: jax.Array | None = None
    ) -> tuple[jax.Array, dict[str, Any]]:
        """Applies the model.

        Args:
          images: (B, H, W, 3) float32, normalized.
          train: draw what training draws (dropout, stochastic depth, sampling reducers), from
            rngs={"dropout": key}.
          index: (B,) int32, the place of each image in the whole batch, where this is only a part
            of it: an image's draws depend on the key and its place alone. Default 0, 1, 2, ...

        Raises:
          InputError: images of another size.
        """
        self.check_images(images)
        rngs = None
        if train and (self.dropout_rate or self.drop_path_rate or self.has_rng("dropout")):
            rngs = self.image_rngs(images.shape[0], index)
        tokens = self.embed(images, fold(rngs, self.depth))

        nothing = Signals(
            class_token=self.class_token,
            grid=self.grid,
            prefix=self.prefix,
            depth=self.depth,
            train=train,
        )
        seen, owners, blocks = [], [], []
        block = nn.remat(Block, static_argnums=(4,)) if self.remat else Block  # 4 is `first`
        for i, keep in enumerate(self.kept):
            module = block(
                num_heads=self.num_heads,
                hidden=self.hidden,
                reducer=self.reducer,
                keep=keep,
                layer=i,
                dropout_rate=self.dropout_rate,
                drop_path_rate=self.drop_path_rate * i / max(self.depth - 1, 1),
                dtype=self.dtype,
                pallas=self.pallas,
                name=f"blocks_{i}",
            )
            # Recomputed blocks store what goes in, so signals go in only where they are read.
            before = seen[-1] if seen and self.reducer.site == "input" else nothing
            if i == self.depth - 1:
                # The logits read the prefix tokens alone. So these are computed by themselves, and
                # jit removes the rest of the last block wherever nobody asks for its patches.
                last, _ = module(tokens, before, fold(rngs, i), self.prefix)
            tokens, signals = module(tokens, before, fold(rngs, i), None)
            seen.append(signals)
            if keep is not None and self.reducer.site == "output":
                signals = signals.replace(blocks=tuple(seen))
                tokens = reduce(self, self.reducer, tokens, signals, keep)
            blocks.append(tokens.x)
            if keep is not None:
                owners.append(tokens.owner)

        features = norm("norm")(last.x)
        head = dict(kernel_init=weight_init, dtype=jnp.float32)
        logits = nn.Dense(self.num_classes, name="head", **head)(features[:, 0])
        out: dict[str, Any] = dict(
            owner=tuple(owners),
            cls_attention=tuple(s.class_attention() for s in seen if s.class_token),
            blocks=tuple(blocks),
            size=tokens.size,
            aux=tokens.aux,
            features=features,
        )
        if self.distilled:
            out["logits_cls"] = logits
            out["logits_dist"] = nn.Dense(self.num_classes, name="head_dist", **head)(
                features[:, 1]
            )
            logits = (out["logits_cls"] + out["logits_dist"]) / 2
        return logits, out

    def embed(self, images: jax.Array, rngs: jax.Array | None) -> Tokens:
        """Patches, prefix tokens and positions: the tokens that enter the first block."""
        batch, pixels = images.shape[0], 3 * math.prod(self.patch_size)

        # DeiT leaves this layer at PyTorch's default for convolutions: uniform in
        # +-1/sqrt(fan_in), for kernel and bias alike.
        uniform = nn.initializers.uniform(2 * pixels**-0.5)

        def default_init(key, shape, dtype=jnp.float32):
            return uniform(key, shape, dtype) - pixels**-0.5

        layer = Affine(
            self.width, kernel_init=default_init, bias_init=default_init, name="patch_embed"
        )
        kernel, bias = (a.astype(self.dtype) for a in layer(pixels))
        patches = functools.partial(embed_patches, patch_size=self.patch_size)
        x = by_chip(patches, images, kernel, bias, dtype=self.dtype)  # (B, P, D)

        names = ("cls_token", "dist_token")[: self.prefix]
        prefix = [self.param(name, weight_init, (1, 1, self.width)) for name in names]
        positions = self.param(
            "pos_embed", weight_init, (1, self.prefix + self.patches, self.width)
        )
        prefix = [jnp.broadcast_to(token, (batch, 1, self.width)) for token in prefix]
        x = jnp.concatenate([*(token.astype(self.dtype) for token in prefix), x], axis=1)
        x = x + positions.astype(self.dtype)
        x = dropout(x, self.dropout_rate, rngs)
        return Tokens(
            x=x,
            size=jnp.ones(x.shape[:2], jnp.float32),
            owner=jnp.broadcast_to(
                jnp.arange(self.patches, dtype=jnp.int32), (batch, self.patches)
            ),
            prefix=self.prefix,
        )


MODEL = ViT  # what create_model("vit") builds
