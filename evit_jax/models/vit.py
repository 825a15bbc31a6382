# SPDX-License-Identifier: Apache-2.0
"""The Vision Transformer (ViT, DeiT, distilled DeiT) with a token reducer in its blocks.

Letters: B images, P original patches, N tokens, D width.
"""

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from evit_jax.errors import InputError
from evit_jax.models.block import Block
from evit_jax.models.card import IMAGENET, Preprocessing
from evit_jax.models.layers import dropout, fold, norm, weight_init
from evit_jax.plan import flops
from evit_jax.plan.counts import Keep, check_layers, rate_within, token_counts, token_plan
from evit_jax.reducers.evit import EViT
from evit_jax.tokens import Reducer, Tokens

CPU_CACHE = 10_000_000  # bytes of activations that a CPU works on fast; found by trying


class ViT(nn.Module):
    """images (B, H, W, 3) -> (logits (B, num_classes) float32, out).

    `out` holds what a user may want besides; jit removes what is not returned from it:
      owner          one (B, P) int32 per block that reduced, see `tokens.Tokens`
      cls_attention  one (B, N) float32 per block: the class token's attention, mean over heads
      blocks         one (B, N, D) per block: the tokens after it
      size           (B, N) float32: original patches inside each final token
      features       (B, prefix, D) float32: the prefix tokens after the last norm
      logits_dist    (B, num_classes) float32, distilled models only: the distillation head, while
      logits_cls     (B, num_classes) float32 is the class head; `logits` is their mean

    `model.clone(keep=model.plan(keep_rate=0.5))` is another program over the same parameters.
    """

    image_size: tuple[int, int] = (224, 224)
    patch_size: tuple[int, int] = (16, 16)
    width: int = 384
    depth: int = 12
    num_heads: int = 6
    mlp_ratio: float = 4.0
    num_classes: int = 1000
    distilled: bool = False  # a second prefix token with a head of its own
    dropout_rate: float = 0.0
    drop_path_rate: float = 0.0  # of the last block; grows linearly from 0 in the first
    keep: Keep = ()  # patch tokens kept by each block, from `plan`; () keeps all
    reducer: Reducer = EViT()
    remat: bool = False  # recompute each block in the backward pass instead of storing its insides
    dtype: jnp.dtype = jnp.float32  # of the computation; parameters are float32

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.image_size[0] // self.patch_size[0], self.image_size[1] // self.patch_size[1]

    @property
    def patches(self) -> int:
        """P, the number of patch tokens entering the first block."""
        return self.grid[0] * self.grid[1]

    @property
    def prefix(self) -> int:
        """Tokens in front of the patches, never reduced: class and distillation token."""
        return 1 + self.distilled

    @property
    def hidden(self) -> int:
        """Width of the MLPs."""
        return int(self.width * self.mlp_ratio)

    @property
    def tokens_per_block(self) -> tuple[int, ...]:
        """Tokens after each block, prefix included."""
        return token_counts(self.kept, self.patches, prefix=self.prefix, extra=self.reducer.extra)

    @property
    def kept(self) -> Keep:
        """`keep` with one entry per block."""
        if self.keep and len(self.keep) != self.depth:
            raise InputError(
                f"keep needs one entry per block, {self.depth}, got {len(self.keep)}; "
                "model.plan(...) makes it"
            )
        return tuple(self.keep) or (None,) * self.depth

    def plan(
        self,
        *,
        keep_rate: float | None = None,
        layers: Sequence[int] | None = None,
        keep_rates: Sequence[float] | None = None,
        tokens: int | Sequence[int | None] | None = None,
        macs: float | None = None,
        multiple_of: int = 1,
        left: float = 0.0,
    ) -> Keep:
        """`plan.token_plan` for this model and its reducer; see there.

        Without rates, counts and budget it is the reducer's own schedule, as far as it has one;
        with both it is an error, but for keep_rate=1, the dense model.

        `macs` is a budget: multiply-accumulates of one image, as `flops.macs` counts them. The plan
        is that of the largest keep rate, one for all `layers`, that does not exceed it. A larger
        budget so never means fewer tokens anywhere, and what the dense model meets is dense.
        """
        at = self.reducer.default_layers(self.depth) if layers is None else layers
        at = check_layers(at, self.depth)
        if keep_rates is None:
            layers = at
        own = self.reducer.schedule(self.patches, self.prefix, at, self.depth)
        given = [request for request in (keep_rate, keep_rates, tokens) if request is not None]
        if macs is not None and given:
            raise InputError(
                "give macs (a budget), or keep rates or tokens, not both; "
                "--config=FILE.py:keep_rate=None unsets a configuration's"
            )
        if macs is None and not given:
            tokens = own
        elif keep_rate != 1 and any(count is not None for count in own):
            raise InputError(
                f"{self.reducer} has a schedule of its own; leave out either that or the rates, "
                "counts or budget (--config=FILE.py:keep_rate=None unsets a configuration's)"
            )
        planned = functools.partial(
            token_plan,
            self.patches,
            self.depth,
            layers=layers,
            multiple_of=multiple_of,
            prefix=self.prefix,
            extra=self.reducer.extra,
            smallest=lambda n: self.reducer.smallest(n, self.prefix),
        )
        if macs is not None:
            keep_rate = rate_within(
                macs, lambda rate: flops.macs(self.clone(keep=planned(keep_rate=rate)))
            )
        return planned(keep_rate=keep_rate, keep_rates=keep_rates, tokens=tokens, left=left)

    def part(self, batch_size: int, *, train: bool = False) -> int:
        """How many images to work on at a time: all, but on a single CPU device a divisor of the
        batch size whose widest activations stay in the caches (docs/performance.md).
        Training needs twice the room, and pairs for mixup.
        """
        alone = jax.default_backend() == "cpu" and jax.device_count() == 1
        if not alone or type(batch_size) is not int:  # an exported program's may be a symbol
            return batch_size
        unit = 1 + train
        most = max(unit, CPU_CACHE // (4 * (self.prefix + self.patches) * self.hidden * unit))
        fitting = (n for n in range(min(most, batch_size), most // 2, -1) if not n % unit)
        return next((n for n in fitting if batch_size % n == 0), batch_size)

    @nn.compact
    def __call__(
        self, images: jax.Array, *, train: bool = False, index: jax.Array | None = None
    ) -> tuple[jax.Array, dict]:
        """Applies the model.

        Args:
          images: (B, H, W, 3) float32, normalised.
          train: draw what training draws (dropout, stochastic depth, sampling reducers), from
            rngs={"dropout": key}.
          index: (B,) int32, the place of each image in the whole batch, where this is only a part
            of it: an image's draws depend on the key and its place alone. Default 0, 1, 2, ...

        Raises:
          InputError: images of another size.
        """
        if images.shape[1:] != (*self.image_size, 3):
            size = images.shape[1:3] if images.ndim == 4 and images.shape[3] == 3 else None
            hint = f"; build it with image_size={size} to change that" if size else ""
            raise InputError(
                f"this model takes images of shape (B, {self.image_size[0]}, {self.image_size[1]}, "
                f"3), got {images.shape}{hint}"
            )
        part, traced = self.part(images.shape[0]), isinstance(images, jax.core.Tracer)
        if traced and part != images.shape[0] and not (train or self.scope.mutable):
            alone, variables = self.clone(parent=None), self.variables
            parts = images.reshape(-1, part, *images.shape[1:])
            result = jax.lax.map(lambda part: alone.apply(variables, part), parts)
            return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), result)

        keys = None
        if train and (self.dropout_rate or self.drop_path_rate or self.has_rng("dropout")):
            index = jnp.arange(images.shape[0]) if index is None else index
            keys = jax.vmap(jax.random.fold_in, (None, 0))(self.make_rng("dropout"), index)
        tokens = self.embed(images, fold(keys, self.depth))

        owners, rows, blocks = [], [], []
        block = nn.remat(Block, static_argnums=(3,)) if self.remat else Block  # 3 is `first`
        for i, keep in enumerate(self.kept):
            module = block(
                num_heads=self.num_heads,
                hidden=self.hidden,
                reducer=self.reducer,
                keep=keep,
                layer=i,
                dropout_rate=self.dropout_rate,
                drop_path_rate=self.drop_path_rate * i / max(self.depth - 1, 1),
                train=train,
                dtype=self.dtype,
                name=f"blocks_{i}",
            )
            if i == self.depth - 1:
                # Logits read the prefix tokens alone. So these are worked out by themselves, and
                # jit removes the rest of the last block wherever nobody asks for its patches.
                last, _ = module(tokens, fold(keys, i), self.prefix)
            tokens, row = module(tokens, fold(keys, i), None)
            rows.append(row)
            blocks.append(tokens.x)
            if keep is not None:
                owners.append(tokens.owner)

        features = norm("norm")(last.x)
        head = dict(kernel_init=weight_init, dtype=jnp.float32)
        logits = nn.Dense(self.num_classes, name="head", **head)(features[:, 0])
        out: dict[str, Any] = dict(
            owner=tuple(owners),
            cls_attention=tuple(rows),
            blocks=tuple(blocks),
            size=tokens.size,
            features=features,
        )
        if self.distilled:
            out["logits_cls"] = logits
            out["logits_dist"] = nn.Dense(self.num_classes, name="head_dist", **head)(
                features[:, 1]
            )
            logits = (out["logits_cls"] + out["logits_dist"]) / 2
        return logits, out

    def embed(self, images: jax.Array, keys: jax.Array | None) -> Tokens:
        """Patches, prefix tokens and positions: the tokens that enter the first block."""
        batch = images.shape[0]
        (rows, columns), (high, wide) = self.grid, self.patch_size
        pixels = 3 * high * wide

        # A convolution whose stride is its size is one matrix product over flattened patches.
        patches = images.astype(self.dtype).reshape(batch, rows, high, columns, wide, 3)
        patches = patches.transpose(0, 1, 3, 2, 4, 5).reshape(batch, self.patches, pixels)
        # DeiT leaves this layer at PyTorch's default for convolutions: uniform in
        # +-1/sqrt(fan_in), for kernel and bias alike.
        uniform = nn.initializers.uniform(2 * pixels**-0.5)

        def default_init(key, shape, dtype=jnp.float32):
            return uniform(key, shape, dtype) - pixels**-0.5

        dense = nn.Dense(
            self.width,
            dtype=self.dtype,
            kernel_init=default_init,
            bias_init=default_init,
            name="patch_embed",
        )
        x = dense(patches)  # (B, P, D)

        names = ("cls_token", "dist_token")[: self.prefix]
        prefix = [self.param(name, weight_init, (1, 1, self.width)) for name in names]
        positions = self.param(
            "pos_embed", weight_init, (1, self.prefix + self.patches, self.width)
        )
        prefix = [jnp.broadcast_to(token, (batch, 1, self.width)) for token in prefix]
        x = jnp.concatenate([*(token.astype(self.dtype) for token in prefix), x], axis=1)
        x = x + positions.astype(self.dtype)
        x = dropout(x, self.dropout_rate, keys)
        return Tokens(
            x=x,
            size=jnp.ones(x.shape[:2], jnp.float32),
            owner=jnp.broadcast_to(
                jnp.arange(self.patches, dtype=jnp.int32), (batch, self.patches)
            ),
            prefix=self.prefix,
        )


MODEL = ViT  # what create_model("vit") builds

SIZES = {
    "tiny": dict(width=192, num_heads=3),
    "small": dict(width=384, num_heads=6),
    "base": dict(width=768, num_heads=12),
}
# DeiT and EViT evaluate at 224/256 of the resized side at every size; timm's ViTs have their own.
DEIT = Preprocessing(**IMAGENET, crop=224 / 256)
HALF = dict(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
NAMED = {
    f"{family}_{size}{distilled}_patch16_{pixels}": (
        SIZES[size] | dict(image_size=pixels, patch_size=16, distilled=bool(distilled)),
        DEIT if family == "deit" else Preprocessing(**HALF, crop=0.9 if pixels == 224 else 1.0),
    )
    for family, distilled in (("vit", ""), ("deit", ""), ("deit", "_distilled"))
    for size in SIZES
    for pixels in (224, 384)
    if pixels == 224 or size == "base"
}
