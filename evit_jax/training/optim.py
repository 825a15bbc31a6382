# SPDX-License-Identifier: Apache-2.0
"""AdamW and LAMB as ViTs are trained: decay on matrices only, warm-up and cosine, clipping."""

import functools

import jax
import jax.numpy as jnp
import optax

from evit_jax.errors import InputError, check_name
from evit_jax.weights.names import of_reducer


def learning_rate(
    *, lr: float, min_lr: float, warmup_lr: float, warmup_steps: int, total_steps: int
) -> optax.Schedule:
    """Linear from `warmup_lr` to `lr`, then the cosine from `lr` to `min_lr` over all steps.

    As in DeiT's scheduler (timm) the cosine is not shifted by the warm-up, it only starts to count
    after it.
    """

    def schedule(step):
        warm = warmup_lr + (lr - warmup_lr) * step / max(warmup_steps, 1)
        fraction = jnp.minimum(step / total_steps, 1.0)
        cosine = min_lr + (lr - min_lr) * 0.5 * (1 + jnp.cos(jnp.pi * fraction))
        return jnp.where(step < warmup_steps, warm, cosine)

    return schedule


def decayed(params: dict) -> dict:
    """True for what weight decay applies to: kernels, not biases, norms, tokens or positions."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)


def lamb(
    schedule: optax.Schedule, *, b1: float, b2: float, weight_decay: float
) -> optax.GradientTransformation:
    """LAMB (https://arxiv.org/abs/1904.00962) as in timm, with which DeiT-III was trained.

    A matrix's step is as long as the matrix, times the learning rate; what does not decay takes
    Adam's step. `optax.lamb` makes no such difference.
    """
    adapted = decayed if weight_decay else lambda params: jax.tree.map(lambda _: False, params)
    return optax.chain(
        optax.scale_by_adam(b1=b1, b2=b2, eps=1e-6),
        optax.add_decayed_weights(weight_decay, mask=decayed),
        optax.masked(optax.scale_by_trust_ratio(), adapted),
        optax.scale_by_learning_rate(schedule),
    )


OPTIMIZERS = dict(adamw=functools.partial(optax.adamw, mask=decayed), lamb=lamb)


def backbone(params: dict) -> dict:
    """True for all parameters but those of reducers.

    Raises:
      InputError: there are no others, so that what is for the backbone is for the whole model.
    """
    marked = jax.tree_util.tree_map_with_path(
        lambda path, _: not of_reducer([key.key for key in path]), params
    )
    if all(jax.tree.leaves(marked)):
        raise InputError(
            "optimizer.backbone_lr and backbone_start_epoch set the backbone apart from parameters "
            "of a reducer, and this model has no such parameters; leave them at 1 and 0, or choose "
            "a method that learns, such as --config.model.reducer=dynamicvit"
        )
    return marked


def slower_backbone(share: float, start: int) -> optax.GradientTransformation:
    """Scales the updates of the backbone to a share of themselves, and to 0 before a step."""

    def factor(step):
        return jnp.where(step < start, 0.0, share)

    return optax.masked(optax.scale_by_schedule(factor), backbone)


def create(
    *,
    name: str = "adamw",  # of OPTIMIZERS
    lr: float,
    min_lr: float,
    warmup_lr: float,
    warmup_steps: int,
    total_steps: int,
    weight_decay: float,
    clip_norm: float,
    b1: float,
    b2: float,
    backbone_lr: float = 1.0,
    backbone_start: int = 0,
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """AdamW with its schedule; gradients are clipped to a global norm first, 0 does not clip.

    Args:
      backbone_lr, backbone_start: of all parameters but the reducers' own, the share of the
        learning rate (and so of weight decay), and the first step, from 0, that moves them.
    """
    schedule = learning_rate(
        lr=lr,
        min_lr=min_lr,
        warmup_lr=warmup_lr,
        warmup_steps=warmup_steps,
        total_steps=total_steps,
    )
    clip = optax.clip_by_global_norm(clip_norm) if clip_norm else optax.identity()
    check_name("optimizer", name, OPTIMIZERS)
    steps = OPTIMIZERS[name](schedule, b1=b1, b2=b2, weight_decay=weight_decay)
    if backbone_lr == 1 and not backbone_start:
        return optax.chain(clip, steps), schedule
    return optax.chain(clip, steps, slower_backbone(backbone_lr, backbone_start)), schedule
