# SPDX-License-Identifier: Apache-2.0
"""The Vision Transformer with a token reducer in its blocks: DeiT, DINOv2, CLIP, SigLIP, ...

What makes one of these of it are the switches of `models.backbone.Backbone`; without any it is
DeiT.

Letters: B images, P original patches, N tokens, D width.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from evit_jax.errors import InputError
from evit_jax.models.backbone import Backbone
from evit_jax.models.block import Block, reduce
from evit_jax.models.layers import Affine, dropout, embed_patches, fold, norm, weight_init
from evit_jax.models.pooling import MapPool, average
from evit_jax.runtime.forms import by_chip
from evit_jax.tokens import Signals, Tokens, unmerge


class Readout(NamedTuple):
    """What comes between the last block and the heads, each possibly the identity."""

    norm: Callable  # of all tokens
    pool: Callable  # (B, n, D), sizes (B, n) -> (B, D), of a `MapPool` its attention besides
    fc_norm: Callable  # of what was pooled


class ViT(Backbone):
    """images (B, H, W, 3) -> (logits (B, num_classes) float32, out).

    With num_classes=0 the pooled features (B, D) float32 take the place of logits. `out` holds what
    a user may want besides; jit removes what is not returned from it:
      owner          one (B, P) int32 per block that reduced, see `tokens.Tokens`
      cls_attention  one (B, N) float32 per block: the class token's attention, mean over heads
      mean_attention the same of the mean query, of models without a class token
      blocks         one (B, N, D) per block: the tokens after it
      size           (B, N) float32: original patches inside each final token
      aux            name -> what reducing blocks reported, see `Tokens.report`
      features       (B, prefix, D) float32: the prefix tokens after the last norm; (B, 1, D), the
                     pooled features, where logits read patches
      dense          (B, P, D) float32: a feature of every original patch, see `tokens.unmerge`,
                     after the last norm where that comes before pooling
      pool_attention (B, n) float32, map pooling only: what the probe attends to, mean over heads;
                     (B, N) where the prefix is pooled, too
      logits_dist    (B, num_classes) float32, distilled models only: the distillation head, while
      logits_cls     (B, num_classes) float32 is the class head; `logits` is their mean
      patch_logits   (B, n, num_classes) float32, models with a `patch_head` only: of the patch
                     tokens that leave the last block; owner[-1] says whose they are. `logits` has
                     half of their largest value added for every class, but in training it is the
                     class head alone, `logits_cls`.
      statistics     training a model with batch norm only: the new running statistics, a tree like
                     the part of the parameters that they are to replace
    """

    @nn.compact
    def __call__(
        self,
        images: jax.Array,
        *,
        train: bool = False,
        index: jax.Array | None = None,
        swap: jax.Array | None = None,
    ) -> tuple[jax.Array, dict[str, Any]]:
        """Applies the model.

        Args:
          images: (B, H, W, 3) float32, normalized.
          train: draw what training draws (dropout, stochastic depth, sampling reducers), from
            rngs={"dropout": key}.
          index: (B,) int32, the place of each image in the whole batch, where this is only a part
            of it: an image's draws depend on the key and its place alone. Default 0, 1, 2, ...
          swap: (B, P) bool, the patches that an image takes from its partner, image 2j from 2j + 1
            and the other way round, once they are embedded and have no position yet (MixToken,
            https://arxiv.org/abs/2104.10858).

        Raises:
          InputError: images of another size, or an odd number of them to swap patches.
        """
        self.check_images(images)
        rngs = None
        if train and (self.dropout_rate or self.drop_path_rate or self.has_rng("dropout")):
            rngs = self.image_rngs(images.shape[0], index)
        x, statistics = self.stem(images, train, fold(rngs, self.depth + 1))
        if swap is not None:
            x = swapped(x, swap)
        tokens = self.embed(x, fold(rngs, self.depth))

        readout = self.readout()
        nothing = Signals(
            probe=self.probe(readout, images.shape[0]),
            class_token=self.class_token,
            last_norm=(self.norm, self.norm_eps) if self.final_norm else None,
            grid=self.grid,
            prefix=self.prefix,
            depth=self.depth,
            train=train,
            plan=self.kept,
            num_classes=self.num_classes,
            mlp_macs=(2 + self.gated) * self.width * self.hidden,
        )
        seen, owners, blocks, last = [], [], [], None
        block = nn.remat(Block, static_argnums=(4,)) if self.remat else Block  # 4 is `first`
        for i, keep in enumerate(self.kept):
            module = block(**self.block_settings(i), keep=keep, name=f"blocks_{i}")
            # Recomputed blocks store what goes in, so signals go in only where they are read.
            before = seen[-1] if seen and self.reducer.site == "input" else nothing
            if i == self.depth - 1 and not self.reads_patches:
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

        logits, read = self.head(readout, tokens, last, train)
        out = dict(
            owner=tuple(owners),
            cls_attention=tuple(s.class_attention() for s in seen if s.class_token),
            mean_attention=tuple(
                s.mean_attention() for s in seen if not (s.class_token or s.q is None)
            ),
            blocks=tuple(blocks),
            size=tokens.size,
            aux=tokens.aux,
        )
        if statistics:
            out["statistics"] = statistics
        return logits, out | read

    def block_settings(self, number: int) -> dict[str, Any]:
        """The fields of a block, but for what it keeps and its name."""
        return dict(
            num_heads=self.num_heads,
            hidden=self.hidden,
            reducer=self.reducer,
            layer=number,
            dropout_rate=self.dropout_rate,
            drop_path_rate=self.drop_path_rate
            * (1 if self.drop_path == "constant" else number / max(self.depth - 1, 1)),
            dtype=self.dtype,
            pallas=self.pallas,
            layer_scale=self.layer_scale,
            post_norm=self.post_norm,
            qk_norm=self.qk_norm,
            qkv_bias=self.qkv_bias,
            proj_bias=self.proj_bias,
            inner_norm=self.inner_norm,
            norm=self.norm,
            norm_eps=self.norm_eps,
            activation=self.activation,
            mlp=self.mlp,
        )

    def readout(self) -> Readout:
        """The modules between the last block and the heads."""
        after_pooling = self.pool == "avg" if self.fc_norm is None else self.fc_norm
        before = after = functools.partial(jnp.asarray, dtype=jnp.float32)
        if self.final_norm and after_pooling:
            after = norm("fc_norm", self.norm, self.norm_eps)
        elif self.final_norm:
            before = norm("norm", self.norm, self.norm_eps)
        if self.pool != "map":
            return Readout(before, average, after)
        pool = MapPool(
            self.width,
            self.pool_heads or self.num_heads,
            self.pool_hidden,
            activation=self.activation,
            norm_kind=self.norm,
            norm_eps=self.norm_eps,
            dtype=self.dtype,
            name="attn_pool",
        )
        return Readout(before, pool, after)

    def probe(self, readout: Readout, batch: int) -> jax.Array | None:
        """`Signals.probe` (B, H, D) float32; None without map pooling."""
        if self.pool != "map":
            return None
        asked = readout.pool.asked()
        if isinstance(readout.norm, nn.Module):
            readout.norm(jnp.zeros((1, self.width)))  # so that it has its parameters
            asked *= readout.norm.variables["params"]["scale"][None]
        return jnp.broadcast_to(asked[None], (batch, *asked.shape))

    def head(
        self, readout: Readout, tokens: Tokens, last: Tokens | None, train: bool
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Logits, and what `out` has of their making.

        Args:
          tokens: all that leave the last block.
          last: its prefix tokens alone, where logits read no others.
          train: whether logits are the class head's alone, whatever patches have to say.
        """
        out: dict[str, jax.Array] = {}
        normed = readout.norm(tokens.x)
        if self.pool != "token":
            start = 0 if self.pool_prefix else self.prefix
            pooled = readout.pool(normed[:, start:], tokens.size[:, start:])
            if self.pool == "map":
                pooled, out["pool_attention"] = pooled
            features = pooled[:, None]
        elif last is None:
            features = normed[:, : self.prefix]
        else:
            features = readout.norm(last.x)
        features = out["features"] = readout.fc_norm(features)

        layer = functools.partial(
            nn.Dense, self.num_classes, kernel_init=weight_init, dtype=jnp.float32
        )
        if not self.num_classes:
            logits = features[:, 0]
            logits = (logits + features[:, 1]) / 2 if self.distilled else logits
        else:
            logits = layer(name="head")(features[:, 0])
            if self.distilled:
                out["logits_cls"] = logits
                out["logits_dist"] = layer(name="head_dist")(features[:, 1])
                logits = (out["logits_cls"] + out["logits_dist"]) / 2
        if self.num_classes and self.patch_head:
            out.setdefault("logits_cls", logits)
            out["patch_logits"] = layer(name="head_aux")(normed[:, self.prefix :])
            if not train:
                there = tokens.size[:, self.prefix :, None] > 0  # an empty slot says nothing
                logits += 0.5 * jnp.max(out["patch_logits"], 1, initial=-jnp.inf, where=there)
        out["dense"] = unmerge(normed, tokens.owner, prefix=self.prefix)
        return logits, out

    def stem(
        self, images: jax.Array, train: bool, rngs: jax.Array | None
    ) -> tuple[jax.Array, dict]:
        """Patches (B, P, D) in the compute dtype, without positions, and `out["statistics"]`."""
        del train, rngs
        pixels = 3 * math.prod(self.patch_size)

        # DeiT leaves this layer at PyTorch's default for convolutions: uniform in
        # +-1/sqrt(fan_in), for kernel and bias alike.
        uniform = nn.initializers.uniform(2 * pixels**-0.5)

        def default_init(key, shape, dtype=jnp.float32):
            return uniform(key, shape, dtype) - pixels**-0.5

        layer = Affine(
            self.width,
            use_bias=not self.pre_norm,
            kernel_init=default_init,
            bias_init=default_init,
            name="patch_embed",
        )
        kernel, bias = jax.tree.map(lambda a: a.astype(self.dtype), layer(pixels))
        patches = functools.partial(embed_patches, patch_size=self.patch_size)
        x = by_chip(patches, images, kernel, bias, dtype=self.dtype)  # (B, P, D)
        if self.embed_norm:
            x = norm("patch_embed_norm", self.norm, self.norm_eps)(x).astype(self.dtype)
        return x, {}

    def embed(self, x: jax.Array, rngs: jax.Array | None) -> Tokens:
        """Patches (B, P, D), prefix tokens and positions: the tokens that enter the first block."""
        batch = x.shape[0]
        counts = dict(cls_token=self.class_token, dist_token=self.distilled)
        counts["reg_token"] = self.registers
        prefix = [
            self.param(name, weight_init, (1, int(count), self.width))
            for name, count in counts.items()
            if count
        ]
        positions = self.positions() if self.absolute_positions else None
        if self.absolute_positions and self.no_embed_class:
            x = x + positions.astype(self.dtype)
        prefix = [jnp.broadcast_to(token, (batch, *token.shape[1:])) for token in prefix]
        x = jnp.concatenate([*(token.astype(self.dtype) for token in prefix), x], axis=1)
        if self.absolute_positions and not self.no_embed_class:
            x = x + positions.astype(self.dtype)
        x = dropout(x, self.dropout_rate, rngs)
        if self.pre_norm:
            x = norm("norm_pre", self.norm, self.norm_eps)(x).astype(self.dtype)
        return Tokens(
            x=x,
            size=jnp.ones(x.shape[:2], jnp.float32),
            owner=jnp.broadcast_to(
                jnp.arange(self.patches, dtype=jnp.int32), (batch, self.patches)
            ),
            prefix=self.prefix,
        )

    def positions(self) -> jax.Array:
        """The positions (1, placed_prefix + P, D) float32."""
        shape = 1, self.placed_prefix + self.patches, self.width
        return self.param("pos_embed", weight_init, shape)


def swapped(x: jax.Array, swap: jax.Array) -> jax.Array:
    """Patches (B, P, D) with those of the image's partner where `swap` (B, P) says so."""
    if len(x) % 2:
        raise InputError(
            f"patches are swapped within pairs of images, got a batch of {len(x)}; choose a batch "
            "size that is even on every device and in every micro-batch"
        )
    partners = x.reshape(-1, 2, *x.shape[1:])[:, ::-1].reshape(x.shape)
    return jnp.where(swap[..., None], partners, x)


MODEL = ViT  # what create_model("vit") builds
