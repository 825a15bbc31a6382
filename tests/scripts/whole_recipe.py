# SPDX-License-Identifier: Apache-2.0
"""Twenty steps with everything on that draws at random, however devices and processes share them.

python -m tests.scripts.whole_recipe MODE ACCUMULATE PROCESSES OUT.npz     is one process of several
JAX_NUM_CPU_DEVICES=4 python -m tests.scripts.whole_recipe     prints how far modes differ
"""

import contextlib
import functools
import sys

import jax
import numpy as np

from evit_jax.data import open_source, pipeline
from evit_jax.models import build_model, init_params
from evit_jax.models.card import Preprocessing
from evit_jax.runtime import parallel, processes
from evit_jax.training import optim, steps
from evit_jax.training.mix import Mix

BATCH, STEPS, B1 = 32, 20, 0.9
MODEL = build_model(
    "vit", image_size=32, patch_size=8, width=32, depth=2, num_heads=2, num_classes=10,
    keep_rate=0.6, layers=(0,), drop_path_rate=0.3, dropout_rate=0.1,
)  # fmt: skip
CARD = Preprocessing()
OPTIMIZER, _ = optim.create(
    lr=1e-3, min_lr=1e-5, warmup_lr=1e-6, warmup_steps=5, total_steps=STEPS, weight_decay=0.05,
    clip_norm=0.0, b1=B1, b2=0.999,
)  # fmt: skip
AUGMENT = dict(
    scale=(0.3, 1.0), ratio=(3 / 4, 4 / 3), flip=True, randaugment_magnitude=9.0,
    randaugment_std=0.5, randaugment_layers=2, color_jitter=0.0, repeats=3, fill=CARD.fill,
    interpolation="bicubic",
)  # fmt: skip


def init(key):
    return steps.init_state(init_params(MODEL, key), OPTIMIZER, ema=True)


def follow(devices, *, accumulate=1, first=0, state=None, last=STEPS):
    """(losses of steps `first` to `last`, first step's gradients as one vector, final state)."""
    recipe = steps.Recipe(
        preprocessing=CARD,
        optimizer=OPTIMIZER,
        mix=Mix(erasing=0.25, mixup=0.8, cutmix=1.0),
        label_smoothing=0.1,
        ema_decay=0.99,
        accumulate=accumulate,
    )
    step = functools.partial(steps.train_step, models=(MODEL,), recipe=recipe)
    state = devices.init(init, jax.random.key(0)) if state is None else state
    program = devices.compile_train(step, state, steps.batch_shapes(MODEL.image_size, BATCH), {})
    batches = pipeline.train_batches(
        open_source("digits", "train"), **AUGMENT, size=MODEL.image_size, seed=0, start=first,
        batch_size=BATCH, host=jax.process_index(), hosts=jax.process_count(), threads=2,
    )  # fmt: skip
    losses, grads = [], None
    with contextlib.closing(batches):
        for _ in range(first, last):
            batch = next(batches)
            batch = devices.put({name: batch[name] for name in ("image", "label")})
            state, figures = program(state, batch, {})
            losses.append(float(figures["loss"]))
            if grads is None:  # Adam's first moment is (1 - b1) times the gradient
                mu = state["opt_state"][1][0].mu
                leaves = [np.asarray(leaf).ravel() for leaf in jax.tree.leaves(mu)]
                grads = np.concatenate(leaves) / (1 - B1)
    return np.array(losses), grads, state


def compare():
    """Prints the relative differences from one device: first gradients, and largest of a loss."""
    one = parallel.DataParallel(jax.devices()[:1])
    sharded = parallel.DataParallel(shard_params=True)
    modes = dict(
        one=one, jit=parallel.DataParallel(), sharded=sharded, pmap=parallel.choose("pmap")
    )
    losses, grads, _ = follow(one)
    for name, accumulate in [
        ("one", 4),
        ("jit", 1),
        ("jit", 4),
        ("sharded", 1),
        ("pmap", 1),
        ("pmap", 4),
    ]:
        others, theirs, _ = follow(modes[name], accumulate=accumulate)
        first = np.linalg.norm(theirs - grads) / np.linalg.norm(grads)
        print(f"{name} x{accumulate}: {first:.1e} {np.abs(others / losses - 1).max():.1e}")


if __name__ == "__main__" and len(sys.argv) == 1:
    compare()
elif __name__ == "__main__":
    mode, accumulate, address, out = sys.argv[1:]
    processes.start_processes(address)
    losses, grads, _ = follow(parallel.choose(mode), accumulate=int(accumulate))
    if jax.process_index() == 0:
        np.savez(out, losses=losses, grads=grads)
