# SPDX-License-Identifier: Apache-2.0
"""The workdir of a training run, made in a second."""

import json

import jax
import numpy as np

from configs import digits
from evit_jax.models import build_model
from evit_jax.training.checkpoint import Checkpoints

MODEL = dict(image_size=(16, 16), width=16, depth=4, num_heads=2, layers=(1, 2))


def make_run(workdir, *, ema=False, checkpoint=True, model=None, **fields):
    """A run on digits: its configuration, and a checkpoint with weights drawn from seed 0.

    Args:
      ema: with an average of the weights, drawn from seed 1, besides.
      model: changes of config.model, others are changes of the configuration itself.

    Returns:
      the weights that tools should find, a nested dict of NumPy arrays.
    """
    config = digits.get_config()
    config.unlock()
    config.model.update(MODEL | (model or {}))
    config.update(fields)
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "config.json").write_text(config.to_json())
    trained = build_model(**json.loads(config.to_json())["model"])
    images = jax.ShapeDtypeStruct((1, *trained.image_size, 3), np.float32)
    shapes = jax.eval_shape(trained.init, jax.random.key(0), images)["params"]

    def draw(seed):
        rng = np.random.default_rng(seed)
        return jax.tree.map(lambda a: rng.normal(0, 0.2, a.shape).astype(np.float32), shapes)

    state = dict(step=np.int32(3), params=draw(0)) | (dict(ema=draw(1)) if ema else {})
    if checkpoint:
        checkpoints = Checkpoints(workdir / "checkpoints")
        checkpoints.save(3, state)
        checkpoints.wait()
    return state.get("ema", state["params"])
