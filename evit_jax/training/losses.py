# SPDX-License-Identifier: Apache-2.0
"""Losses, in float32, one value per image."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp


def smooth_labels(labels: jax.Array, num_classes: int, smoothing: float) -> jax.Array:
    """(B,) int labels -> (B, num_classes) targets with `smoothing` spread over all classes."""
    return (1 - smoothing) * jax.nn.one_hot(labels, num_classes) + smoothing / num_classes


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Logits and target probabilities (B, num_classes) -> (B,) float32 nats."""
    return -jnp.sum(targets * jax.nn.log_softmax(logits.astype(jnp.float32)), axis=-1)


def binary_cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Every class by itself, there or not, as DeiT-III learns: (B, num_classes) -> (B,) nats.

    A class with any part in the targets is there, so both classes of a mixed image are. The mean
    over classes.
    """
    logits = logits.astype(jnp.float32)
    return jnp.mean(jax.nn.softplus(logits) - logits * (targets > 0), axis=-1)


LOSSES = dict(ce=cross_entropy, bce=binary_cross_entropy)


def divergence(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Kullback-Leibler divergence of softmax(logits) from target probabilities, (B,) nats."""
    return cross_entropy(logits, targets) + jnp.sum(jax.scipy.special.xlogy(targets, targets), -1)


@dataclasses.dataclass(frozen=True)
class Distillation:
    """Learning from a teacher's logits as well as from labels (DeiT, Touvron et al. 2021).

    The loss is (1 - alpha) * cross entropy with the labels + alpha * the teacher's part: with
    `hard` the cross entropy with the teacher's decision, else temperature^2 times the divergence of
    the softened student from the softened teacher. (DeiT's code divides the latter by the number of
    classes as well, which its paper does not.)
    """

    hard: bool = True
    alpha: float = 0.5
    temperature: float = 1.0  # of soft distillation
    tokens: float = 0.0  # weight of `token_loss`, which is added

    def targets(self, logits: jax.Array) -> jax.Array:
        """The teacher's logits (B, C) -> the probabilities to learn, without a gradient."""
        logits = jax.lax.stop_gradient(logits.astype(jnp.float32))
        if self.hard:
            return jax.nn.one_hot(jnp.argmax(logits, axis=-1), logits.shape[-1])
        return jax.nn.softmax(logits / self.temperature)

    def loss(self, base: jax.Array, logits: jax.Array, targets: jax.Array) -> jax.Array:
        """The labels' loss (B,), the student's logits and `targets` (B, C) -> (B,)."""
        if self.hard:
            learned = cross_entropy(logits, targets)
        else:
            learned = self.temperature**2 * divergence(logits / self.temperature, targets)
        return (1 - self.alpha) * base + self.alpha * learned

    def token_loss(self, out: dict, targets: dict) -> jax.Array:
        """`tokens` times the mean squared difference of tokens from the teacher's, (B,).

        Of a reducer that recovers patches (SiT), all of them after each block after which it does.
        Of others the final ones, as in DynamicViT, and those that still have a token of their own
        in the end: neither dropped, nor hidden in training, nor merged. An image without any has
        none to learn of.

        Args:
          out: of the student, see `models.vit.ViT`.
          targets: of the teacher, see `teacher_tokens`.
        """
        recovered = out["aux"].get("recovered", ())
        if recovered:  # after the last so many blocks, since there are never more tokens again
            pairs = zip(recovered, targets["blocks"][-len(recovered) :], strict=True)
            parts = [jnp.mean(squares(ours, theirs), axis=1) for ours, theirs in pairs]
            return self.tokens * sum(parts) / len(parts)
        difference = squares(out["dense"], targets["dense"])
        if not out["owner"]:
            return self.tokens * jnp.mean(difference, axis=1)
        owner = out["owner"][-1]
        together = jnp.sum(owner[:, None] == owner[:, :, None], axis=2)  # (B, P)
        alone = ((owner >= 0) & (together == 1)).astype(jnp.float32)
        count = jnp.maximum(jnp.sum(alone, axis=1), 1)
        return self.tokens * jnp.sum(alone * difference, axis=1) / count


def squares(x: jax.Array, targets: jax.Array) -> jax.Array:
    """Mean squared difference of each token (B, P, D) from its target -> (B, P) float32."""
    difference = x.astype(jnp.float32) - targets.astype(jnp.float32)
    return jnp.mean(jnp.square(difference), axis=-1)


def teacher_tokens(out: dict) -> dict:
    """What of a dense teacher's tokens may be learned, without a gradient.

    Returns:
      dense (B, P, D), the final ones, and blocks, one (B, P, D) per block: the patches after it.
    """
    patches = out["dense"].shape[1]
    blocks = tuple(x[:, -patches:] for x in out["blocks"])
    return jax.lax.stop_gradient(dict(dense=out["dense"], blocks=blocks))


def reported(aux: dict, targets: jax.Array, learn: Callable = cross_entropy) -> jax.Array | float:
    """What the reducers add to the loss, (B,), or 0 where they reported nothing.

    Args:
      aux: of the model, see `tokens.Tokens.report`: `loss` (B,), and `logits` (B, num_classes),
        which are to learn the same as the model's.
      targets: (B, num_classes) probabilities.
      learn: the loss of such logits, one of LOSSES.
    """
    heads = [learn(logits, targets) for logits in aux.get("logits", ())]
    return sum([*aux.get("loss", ()), *heads])
