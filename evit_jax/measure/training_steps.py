# SPDX-License-Identifier: Apache-2.0
"""Training steps ready to be timed on one device.

Apart from `programs`, since this needs optax and `import evit_jax` shall not wait for it.
"""

import dataclasses
import functools
import time
from collections.abc import Callable

import jax
import numpy as np

from evit_jax.measure.programs import Program, account
from evit_jax.models.card import Preprocessing
from evit_jax.runtime.parallel import DataParallel
from evit_jax.training import optim, steps
from evit_jax.training.mix import Mix


@dataclasses.dataclass
class Training:
    """Training steps of models with the same parameters, on one synthetic batch.

    The step is `train.py`'s: uint8 images, label smoothing, AdamW with its schedule. The programs
    hand one state from each to the next, since each gives up the one it gets.
    """

    params: dataclasses.InitVar[dict]  # float32
    preprocessing: Preprocessing
    batch: dict[str, jax.Array]  # of `steps.batch_shapes`
    devices: DataParallel

    def __post_init__(self, params: dict):
        self.recipe = benchmark_recipe(self.preprocessing)
        self.state = self.devices.init(functools.partial(first_state, self.recipe), params)

    def program(self, model) -> Program:
        """The step of one model."""
        start = time.perf_counter()
        program, count = compile_step(model, self.recipe, self.state, self.batch, self.devices)
        seconds = time.perf_counter() - start

        def call():
            self.state, figures = program(self.state, self.batch, {})
            return figures  # of the same execution as the state, which the next call gives up

        return Program(call, seconds, **account(program, loops=count))


def benchmark_recipe(preprocessing: Preprocessing) -> steps.Recipe:
    """That of the step, with settings that take the time that a run's would."""
    rates = dict(lr=1e-5, min_lr=1e-6, warmup_lr=1e-6, warmup_steps=100, total_steps=100_000)
    adam = dict(weight_decay=0.05, clip_norm=0.0, b1=0.9, b2=0.999)
    optimizer, _ = optim.create(**rates, **adam)
    return steps.Recipe(preprocessing, optimizer, Mix(), label_smoothing=0.1)


def first_state(recipe: steps.Recipe, params: dict) -> dict:
    """The state before the first step."""
    return steps.init_state(params, recipe.optimizer, ema=False)


def compile_step(
    model, recipe: steps.Recipe, state: dict, batch: dict, devices: DataParallel
) -> tuple[Callable, int]:
    """(the compiled step of a model, its number of micro-batches).

    Args:
      state, batch: arrays, or shapes and dtypes of arrays.
    """
    count = steps.micro_batches(model, batch["label"].shape[0], platform=devices.platform)
    recipe = dataclasses.replace(recipe, accumulate=count)
    step = functools.partial(steps.train_step, models=(model,), recipe=recipe)
    return devices.compile_train(step, state, batch, {}), count


def synthetic_batch(
    image_size: tuple[int, int], batch_size: int, num_classes: int, devices: DataParallel
) -> dict[str, jax.Array]:
    """A training batch of noise, on the device."""
    rng = np.random.default_rng(0)
    shapes = steps.batch_shapes(image_size, batch_size)
    image = rng.integers(0, 256, shapes["image"].shape, np.uint8)
    label = rng.integers(0, num_classes, shapes["label"].shape, np.int32)
    return devices.put(dict(image=image, label=label))
