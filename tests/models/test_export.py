# SPDX-License-Identifier: Apache-2.0
"""Accelerators from a CPU machine: the programs that train there can at least be made."""

import functools

import jax
import pytest
from jax import export

from configs import deit3, evit_deit, evit_lvvit
from evit_jax.data.labels import PUBLISHED
from evit_jax.models import build_model, init_params, preprocessing
from evit_jax.models.fused_gpu import EXPORTED
from evit_jax.training import optim, steps
from evit_jax.training.labeling import TokenLabels
from evit_jax.training.mix import Mix


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize(("recipe_of", "depth"), [(evit_deit, 12), (evit_lvvit, 4), (deit3, 4)])
def test_the_whole_training_step_of_the_small_model_lowers_for(platform, recipe_of, depth):
    config = recipe_of.get_config()
    model = build_model(**dict(config.model) | dict(depth=depth))
    settings = dict(config.optimizer)
    for field in ("warmup_epochs", "backbone_start_epoch"):
        settings.pop(field)
    optimizer, _ = optim.create(**settings, warmup_steps=5, total_steps=300)
    recipe = steps.Recipe(
        preprocessing=preprocessing(config.model.name),
        optimizer=optimizer,
        mix=Mix(**config.mix),
        loss=config.loss,
        labels=TokenLabels(),
        label_smoothing=config.label_smoothing,
        ema_decay=config.ema_decay,
    )
    state = jax.eval_shape(
        lambda key: steps.init_state(init_params(model, key), optimizer, ema=True),
        jax.random.key(0),
    )
    label_map = PUBLISHED if recipe_of is evit_lvvit else None
    batch = steps.batch_shapes(model.image_size, config.batch_size, label_map=label_map)
    step = functools.partial(steps.train_step, models=(model,), recipe=recipe)
    # A machine with cuDNN puts its kernels into the program, which JAX exports only when told to.
    trusted = [export.DisabledSafetyCheck.custom_call(name) for name in EXPORTED]
    program = export.export(jax.jit(step), platforms=[platform], disabled_checks=trusted)
    exported = program(state, batch, {})
    assert exported.platforms == (platform,)
    after, figures = jax.tree.unflatten(exported.out_tree, exported.out_avals)
    assert jax.tree.map(lambda a: a.shape, after) == jax.tree.map(lambda a: a.shape, state)
    assert figures["loss"].shape == ()
