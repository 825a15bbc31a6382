# SPDX-License-Identifier: Apache-2.0
"""What every backbone shares: its sizes, its token plan, and what others may read of it."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from evit_jax.errors import InputError, check_name
from evit_jax.models.layers import ACTIVATIONS
from evit_jax.plan import flops
from evit_jax.plan.counts import (
    Entry,
    Keep,
    check_layers,
    rate_within,
    round_up,
    token_counts,
    token_plan,
)
from evit_jax.plan.ramp import first_block, ramp, ramp_within
from evit_jax.reducers import without_class_token
from evit_jax.reducers.evit import EViT
from evit_jax.tokens import SITES, Reducer
from evit_jax.weights.positions import METHODS

CHOICES = dict(
    position_resize=(*METHODS, "bilinear_corners"),
    norm=("layer", "rms"),
    activation=tuple(ACTIVATIONS),
    mlp=("plain", "swiglu", "swiglu_packed"),
    pool=("token", "avg", "map"),
    drop_path=("linear", "constant"),
)


class Backbone(nn.Module):
    """Base of all backbones: images (B, H, W, 3) -> (logits (B, num_classes) float32, out).

    `model.clone(keep=model.plan(keep_rate=0.5))` is another program over the same parameters.

    What the rest of the package reads of a model, and a new backbone has to mean the same by:
      image_size, patch_size   (height, width) in pixels
      width, depth, num_heads, hidden, gated, num_classes, dtype
      grid, patches            rows and columns of patches; P, their number
      prefix, class_token      tokens in front of the patches, never reduced; whether the first of
                               them is a class token
      placed_prefix            how many of the prefix tokens have a position
      position_resize          how they are resized, see `weights.positions`
      batch_norm               whether parameters hold running statistics, see `models.lvvit`
      reads_patches, last      whether logits read patches; what a ramp leaves of them in the end
      keep, reducer, remat     fields that may be cloned with other values over the same parameters
      kept, tokens_per_block   the plan with one entry per block; tokens after each, prefix included
      plan(...)                rates, counts or a budget -> `keep`
      stem_macs, head_macs     multiply-accumulates of one image before the first and after the last
                               block
    and of its parameters: `pos_embed` (1, placed_prefix + P, D), heads, named `head...`, and
    blocks, named `blocks_0` and so on, with a `reduction` in each for a reducer's own, and perhaps
    a `recovery` (`Reducer.recovers`). Leaves named `mean` and `var` are running statistics, which
    training replaces and does not learn.
    """

    image_size: tuple[int, int] = (224, 224)
    patch_size: tuple[int, int] = (16, 16)
    width: int = 384
    depth: int = 12
    num_heads: int = 6
    mlp_ratio: float = 4.0
    num_classes: int = 1000  # 0: the pooled features instead of logits
    # In front of the patches: class, distillation token (with a head of its own), registers.
    class_token: bool = True
    distilled: bool = False
    registers: int = 0
    absolute_positions: bool = True  # a learned embedding of every position
    no_embed_class: bool = False  # positions are for patches only
    # How positions are made for another image size: "bicubic" (DeiT's), "bicubic_antialias"
    # (timm's) or "bilinear" (FlexiViT's), see `weights.positions`.
    position_resize: str = "bicubic"
    pre_norm: bool = False  # a norm before the blocks, and patches without a bias (CLIP)
    embed_norm: bool = False  # a norm of the embedded patches, before positions
    layer_scale: float | None = None  # what LayerScale starts from; None has none
    post_norm: bool = False  # norms after attention and MLP, not before
    qk_norm: bool = False  # of each head's queries and keys
    inner_norm: bool = False  # of what enters the projection and the MLP's second layer (BEiT-3)
    norm: str = "layer"  # or "rms"
    norm_eps: float = 1e-6
    qkv_bias: bool | str = True  # "qv": of queries and values alone (BEiT, EVA)
    split_qkv: bool = False  # timm's files have layers of their own for q, k and v
    proj_bias: bool = True  # of the projection and the MLP
    activation: str = "gelu"  # or "gelu_tanh", "quick_gelu", "silu"
    mlp: str = "plain"  # or "swiglu", "swiglu_packed", see `layers.Mlp`
    pool: str = "token"  # or "avg", "map": what logits read, the first token or patches
    pool_heads: int | None = None  # of map pooling; None: num_heads
    pool_mlp_ratio: float | None = None  # of map pooling; None: mlp_ratio
    pool_prefix: bool = False  # prefix tokens are pooled, too
    fc_norm: bool | None = None  # the last norm after pooling, not before; None: where pool is avg
    patch_head: bool = False  # a classifier of every patch token besides (token labeling)
    final_norm: bool = True
    dropout_rate: float = 0.0
    drop_path_rate: float = 0.0  # of the last block
    drop_path: str = "linear"  # from 0 in the first block; or "constant", alike in all (DeiT-III)
    keep: Keep = ()  # patch tokens kept by each block, from `plan`; () keeps all
    reducer: Reducer = EViT()
    remat: bool = False  # recompute each block in the backward pass instead of storing its insides
    dtype: jnp.dtype = jnp.float32  # of the computation; parameters are float32
    # On a TPU, attention by a Pallas kernel (models/fused_tpu.py) in programs for a single chip:
    # XLA cannot split it over several. Not timed on a TPU yet, so not the default.
    pallas: bool = False

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
        """Tokens in front of the patches, never reduced."""
        return self.class_token + self.distilled + self.registers

    @property
    def placed_prefix(self) -> int:
        """Prefix tokens that have a position embedding."""
        return 0 if self.no_embed_class else self.prefix

    @property
    def hidden(self) -> int:
        """Width of what enters the MLP's second layer."""
        first = int(self.width * self.mlp_ratio)
        return first // 2 if self.mlp == "swiglu_packed" else first

    @property
    def pool_hidden(self) -> int:
        """Width of map pooling's MLP."""
        return int(self.width * (self.pool_mlp_ratio or self.mlp_ratio))

    @property
    def gated(self) -> bool:
        """Whether the MLP's first layer makes a gate besides."""
        return self.mlp != "plain"

    @property
    def batch_norm(self) -> bool:
        """Whether there is a norm over the images of a batch, so what it is split into matters."""
        return False

    @property
    def reads_patches(self) -> bool:
        """Whether logits read the patch tokens, not the prefix alone."""
        return self.pool != "token" or (self.patch_head and self.num_classes > 0)

    @property
    def last(self) -> int | None:
        """What a ramp leaves of the last block's patch tokens at most; None: no less than others.

        A method may leave few of them, but not where logits read them.
        """
        return None if self.reads_patches else self.reducer.last(self.prefix)

    @property
    def stem_macs(self) -> int:
        """Multiply-accumulates of one image's patch embedding."""
        high, wide = self.patch_size
        return self.patches * 3 * high * wide * self.width

    @property
    def head_macs(self) -> int:
        """Multiply-accumulates of one image's map pooling and classifiers."""
        macs = (1 + self.distilled) * self.width * self.num_classes
        if self.patch_head:
            macs += (self.tokens_per_block[-1] - self.prefix) * self.width * self.num_classes
        if self.pool == "map":  # keys, values, logits and their sum; query, projection and MLP
            tokens = self.tokens_per_block[-1] - (0 if self.pool_prefix else self.prefix)
            macs += 2 * tokens * self.width**2 + 2 * tokens * self.width
            macs += 2 * self.width**2 + 2 * self.width * self.pool_hidden
        return macs

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
        self.check_class_token(self.keep)
        return tuple(self.keep) or (None,) * self.depth

    def plan(
        self,
        *,
        keep_rate: float | None = None,
        layers: Sequence[int] | None = None,
        keep_rates: Sequence[float] | None = None,
        tokens: int | Sequence[Entry] | None = None,
        macs: float | None = None,
        multiple_of: int = 1,
        remaining: float = 0.0,
    ) -> Keep:
        """`plan.counts.token_plan` for this model and its reducer; see there.

        Without rates, counts and budget it is the reducer's own schedule, as far as it has one;
        with both it is an error, but for keep_rate=1, the dense model.

        `macs` is a budget: multiply-accumulates of one image, as `flops.macs` counts them. The plan
        is that of the largest keep rate, one for all `layers`, that does not exceed it. A larger
        budget so never means fewer tokens anywhere, and what the dense model meets is dense. A
        method that says so (`Reducer.ramped`) gets a `ramp` instead.
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
            returns=self.reducer.brings_back,
        )
        if macs is not None:
            if self.reducer.ramped:
                keep = self.ramp(macs, layers=at, multiple_of=multiple_of)
                if keep is not None:
                    return planned(tokens=keep)
            keep_rate = rate_within(
                macs, lambda rate: flops.macs(self.clone(keep=planned(keep_rate=rate)))
            )
        keep = planned(
            keep_rate=keep_rate, keep_rates=keep_rates, tokens=tokens, remaining=remaining
        )
        early = [layer for layer, entry in enumerate(keep[:-1]) if entry is not None]
        if self.reducer.site == "output" and early:
            raise InputError(
                f"{self.reducer} works after the last block, {self.depth - 1}, which is the only "
                f"one that can be in its layers, got {early[0]}"
            )
        self.check_class_token(keep)
        return keep

    def ramp(
        self,
        budget: float,
        *,
        first: int | None = None,
        layers: Sequence[int] | None = None,
        multiple_of: int = 1,
        cost: Callable[["Backbone"], float] = flops.macs,
    ) -> Keep | None:
        """A plan within a budget that loses the same share of the tokens in every block.

        Args:
          budget: what `cost` may be at most; multiply-accumulates of one image by default.
          first: the first block that reduces; default by `plan.ramp.first_block`, or the latest
            before it from which the budget can be met.
          layers: blocks that may reduce; default the reducer's own.
          multiple_of: of what the tokens after each reducing block are a multiple.
          cost: what a model costs.

        Returns:
          The plan, or None where no such plan meets the budget.
        """
        layers = self.reducer.default_layers(self.depth) if layers is None else layers
        same = dict(layers=layers, multiple_of=multiple_of, cost=cost)

        def cost_of(keep: Keep) -> float:
            return cost(self.clone(keep=keep))

        if first is None:
            share = budget / cost_of(())
            tries = (
                self.ramp(budget, first=block, **same)
                for block in range(first_block(share, self.depth), -1, -1)
            )
            return next((keep for keep in tries if keep is not None), None)

        def smallest(n: int) -> int:
            return self.reducer.smallest(n, self.prefix)

        def at(rate: float) -> Keep:
            keep = ramp(
                self.patches,
                layers,
                self.depth,
                first=first,
                rate=rate,
                last=self.last if rate < 1 else None,
                smallest=smallest,
            )
            fixed = dict(prefix=self.prefix, extra=self.reducer.extra, smallest=smallest)
            return round_up(keep, self.patches, multiple_of=multiple_of, **fixed)

        return ramp_within(budget, cost_of, at)

    def rate_within(self, macs: float, **settings) -> float:
        """The keep rate of `plan(macs=..., **settings)`."""
        return rate_within(
            macs,
            lambda rate: flops.macs(self.clone(keep=self.plan(keep_rate=rate, **settings))),
        )

    def check(self) -> None:
        """Raises InputError for impossible sizes, broken patches and heads that do not fit."""
        fewest = dict(width=1, depth=1, num_heads=1, num_classes=0, registers=0)
        for name, least in fewest.items():
            if type(getattr(self, name)) is not int or getattr(self, name) < least:
                raise InputError(
                    f"{name} must be a whole number from {least} up, got {getattr(self, name)}"
                )
        for name, choices in CHOICES.items():
            check_name(name, getattr(self, name), choices)
        if not self.class_token and (self.pool == "token" or self.distilled):
            raise InputError(
                "a model without a class token needs pool='avg' or pool='map', and is not distilled"
            )
        for name in ("drop_path_rate", "dropout_rate"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        sides = zip(("height", "width"), self.image_size, self.patch_size, strict=True)
        for side, image, patch in sides:
            if image < patch:
                raise InputError(f"image {side} {image} is smaller than a patch of {patch}")
            if image % patch:
                near = round(image / patch) * patch
                raise InputError(
                    f"image {side} {image} is not a multiple of the patch {side} {patch}; "
                    f"the nearest that is: {near}"
                )
        for heads in (self.num_heads, self.pool_heads or 1):
            if self.width % heads:
                raise InputError(
                    f"width {self.width} does not divide into {heads} heads of equal width"
                )
        if self.reducer.site not in SITES:
            raise InputError(
                f"{self.reducer} works at the site {self.reducer.site!r}; there are "
                f"{', '.join(SITES)}"
            )

    def check_class_token(self, keep: Keep) -> None:
        """Raises InputError for a plan whose reducer asks for a class token that is not there."""
        if self.reducer.reads_class_token and not self.class_token and any(keep):
            raise InputError(
                f"{self.reducer} asks what the class token attends to, and the model has no class "
                f"token; {without_class_token()}"
            )

    def check_images(self, images: jax.Array) -> None:
        """Raises InputError for images of another size than the model's."""
        if images.shape[1:] == (*self.image_size, 3):
            return
        size = images.shape[1:3] if images.ndim == 4 and images.shape[3] == 3 else None
        hint = f"; build it with image_size={size} to change that" if size else ""
        raise InputError(
            f"this model takes images of shape (B, {self.image_size[0]}, {self.image_size[1]}, "
            f"3), got {images.shape}{hint}"
        )

    def image_rngs(self, count: int, index: jax.Array | None) -> jax.Array:
        """(B,) random keys, one per image, from the rng "dropout" and each image's place alone.

        Args:
          count: B, where `index` is None and the places are 0 to B - 1.
          index: (B,) int32, places in the whole batch.
        """
        index = jnp.arange(count) if index is None else index
        return jax.vmap(jax.random.fold_in, (None, 0))(self.make_rng("dropout"), index)

    @nn.compact
    def __call__(
        self,
        images: jax.Array,
        *,
        train: bool = False,
        index: jax.Array | None = None,
        swap: jax.Array | None = None,
    ) -> tuple[jax.Array, dict[str, Any]]:
        """Applies the model; see `models.vit.ViT`."""
        raise TypeError(f"{type(self).__name__} does not define how it is applied")
