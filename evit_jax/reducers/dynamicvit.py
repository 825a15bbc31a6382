# SPDX-License-Identifier: Apache-2.0
"""DynamicViT: a small network predicts which patches to keep (Rao et al., NeurIPS 2021)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from evit_jax.plan.counts import Entry
from evit_jax.reducers._scores import best
from evit_jax.tokens import F32, Reducer, Signals, Tokens, drop, follow


class DynamicViT(nn.Module, Reducer):
    """Keeps the K patch tokens that are most probably to be kept, and learns the probabilities.

    Before its block: z = gelu(W_0 norm(x)), whose second half of channels is replaced by its mean
    over the tokens still there; an MLP D, D/2, D/4, 2 and a log softmax give log probabilities of
    keeping and dropping. The public code's sizes and initialization. Its cost, 1.6 n D^2, is not
    in the counts of `plan.flops`, which count pairs of tokens alone.

    In evaluation the K tokens with the highest log probability of keeping stay, in that order. In
    training all tokens stay, and each is hidden or not by a draw: Gumbel noise on the log
    probabilities, the larger of the two wins, and the gradient is that of their softmax
    (straight-through). What a block hides stays hidden: `Tokens.weight` is the decision so far, so
    no other token attends to a hidden one, its size is 0 and it owns no patch. Without random keys
    nothing is drawn, and the larger probability wins.

    The loss is `ratio_weight` times the mean over reducing blocks of (share kept - K / P)^2, P the
    patches of the image. The plan so is the target in training and exact in evaluation; the paper's
    is rho, rho^2, rho^3 in blocks 3, 6, 9, as one keep rate gives it. The public code adds 1e-6 / N
    to every term of the softmax in training, by which hidden tokens leak into the others; here
    nothing does, so a training step and evaluation agree where the decisions do.
    """

    one_plan = True
    site = "input"

    ratio_weight: float = 2.0  # the paper's; 5 for DeiT-B

    @nn.compact
    def __call__(self, tokens: Tokens, signals: Signals, keep: Entry) -> Tokens:
        prefix, there = tokens.prefix, tokens.weight
        there = jnp.ones_like(tokens.size) if there is None else there
        logs = self.log_probabilities(tokens.x[:, prefix:], there[:, prefix:])  # (B, n, 2)
        if not signals.train:
            odds = logs[..., 0] - logs[..., 1]  # in the same order, but does not saturate at 0
            return drop(tokens, best(odds, tokens, keep))

        if signals.rng is not None:
            draw = jax.vmap(lambda key: jax.random.gumbel(key, logs.shape[1:]))
            logs = logs + draw(signals.rng)
        soft = nn.softmax(logs)[..., 0]
        hard = (logs[..., 0] >= logs[..., 1]).astype(F32)
        # What is subtracted is equal, so that the mask is 0 or 1 exactly.
        decision = hard + (soft - jax.lax.stop_gradient(soft))  # (B, n)
        mask = decision * there[:, prefix:]
        place = jnp.arange(tokens.patches, dtype=jnp.int32)[None]
        place = jnp.where(jax.lax.stop_gradient(mask) > 0, place, -1)
        decision = jnp.pad(decision, ((0, 0), (prefix, 0)), constant_values=1)
        share = jnp.mean(mask, axis=1) - keep / tokens.owner.shape[1]
        stages = max(sum(entry is not None for entry in signals.plan), 1)
        return tokens.replace(
            weight=there * decision,
            size=tokens.size * decision,
            owner=follow(tokens.owner, place),
        ).report(loss=self.ratio_weight / stages * jnp.square(share))

    def log_probabilities(self, x: jax.Array, there: jax.Array) -> jax.Array:
        """Of keeping and of dropping patch tokens x (B, n, D), of which some are there (B, n).

        Returns:
          (B, n, 2) float32.
        """
        width, dtype = x.shape[-1], x.dtype

        def layer(name, width, x):
            init = nn.initializers.normal(0.02)
            return nn.Dense(width, dtype=dtype, kernel_init=init, name=name)(x)

        def gelu(x):
            return nn.gelu(x, approximate=False)

        z = nn.LayerNorm(dtype=F32, epsilon=1e-5, name="norm")(x).astype(dtype)
        z = gelu(layer("in", width, z))
        own, others = z[..., : width // 2], z[..., width // 2 :].astype(F32)
        count = jnp.sum(there, axis=1)[:, None, None]
        mean = jnp.sum(others * there[..., None], axis=1, keepdims=True)
        mean = mean / jnp.where(count > 0, count, 1)  # a draw may have left nothing
        mean = jnp.broadcast_to(mean.astype(dtype), others.shape)
        y = gelu(layer("fc1", max(width // 2, 1), jnp.concatenate([own, mean], axis=-1)))
        y = gelu(layer("fc2", max(width // 4, 1), y))
        return nn.log_softmax(layer("out", 2, y).astype(F32))


REDUCER = DynamicViT
