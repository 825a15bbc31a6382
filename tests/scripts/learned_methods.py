# SPDX-License-Identifier: Apache-2.0
"""What methods that learn reach in 200 steps on digits, beside `random` trained as long.

python -m tests.scripts.learned_methods [METHOD ...]

A dense model is trained first; every method starts from it. The table has the loss that is the
method's own (what it reports, else the model's cross entropy) on the test images before and after,
and the test accuracy of the reduced model, at equal multiply-accumulates.
"""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np

from evit_jax.data import open_source
from evit_jax.models import build_model, init_params
from evit_jax.models.card import Preprocessing
from evit_jax.plan.flops import macs
from evit_jax.reducers.diffrate_search import DiffRateSearch, learned_counts
from evit_jax.tables import table
from evit_jax.training import losses, optim, steps
from evit_jax.training.mix import Mix

SIZES = dict(image_size=24, patch_size=4, width=48, depth=4, num_heads=4, num_classes=10)
ONCE = dict(keep_rate=0.25, layers=(0,))  # before or in the first block, so that choosing matters
OFTEN = dict(keep_rate=0.6, layers=(1, 2, 3))
BATCH, STEPS, DENSE_STEPS = 64, 200, 1500
CARD = Preprocessing()
# Reducer -> its plan, and changes of the optimizer's settings. A search of counts leaves the model
# as it is. A second `random` has the multiply-accumulates of what follows it.
METHODS = {
    "random": (dict(macs=1.25e6, layers=(0,)), {}),
    "cropr": (ONCE, {}),
    "sit": (ONCE, {}),
    "patchmerger": (ONCE, {}),
    "stvit": (ONCE, {}),
    "ats": (dict(macs=1.25e6, layers=(0,)), {}),
    "random:seed=1": (dict(macs=2.67e6, layers=(1, 2, 3)), dict(lr=2e-3)),
    "dynamicvit:ratio_weight=8.0": (OFTEN, dict(lr=2e-3)),
    "random:seed=2": (dict(macs=3.1e6, layers=(1, 2, 3)), {}),
    "diffrate_search:weight=1e5": (OFTEN, dict(lr=0.05, backbone_lr=0.0)),
}
TAUGHT = losses.Distillation(hard=False, alpha=1 / 3, tokens=1 / 3)  # DynamicViT's, times 2 / 3


@functools.cache
def images_of(split):
    """(images (B, 24, 24, 3) uint8, labels (B,)) of digits."""
    source = open_source("digits", split)
    images = [source[i]["image"] for i in range(len(source))]
    images = [image if image.ndim == 3 else np.repeat(image[..., None], 3, 2) for image in images]
    return np.stack(images)[:, 4:28, 4:28], np.asarray(source.labels, np.int32)


def train(model, params, count, *, teacher=None, lr=1e-3, **settings):
    """The parameters after so many steps."""
    optimizer, _ = optim.create(
        lr=lr, min_lr=lr / 20, warmup_lr=0.0, warmup_steps=20, total_steps=count,
        weight_decay=0.01, clip_norm=0.0, b1=0.9, b2=0.999, **settings,
    )  # fmt: skip
    recipe = steps.Recipe(CARD, optimizer, Mix())
    frozen = {}
    if teacher:
        kind = dict(distillation=TAUGHT, teacher=teacher[0])
        recipe, frozen = steps.Recipe(CARD, optimizer, Mix(), **kind), dict(teacher=teacher[1])
    step = functools.partial(steps.train_step, models=(model,), recipe=recipe)
    # Run for long enough to be optimized, also by tests, which tell XLA to compile quickly.
    step = jax.jit(step, compiler_options=dict(xla_backend_optimization_level=3))
    state = jax.jit(functools.partial(steps.init_state, optimizer=optimizer, ema=False))(params)
    images, labels = images_of("train")
    for number in range(count):
        at = np.random.default_rng(number).permutation(len(labels))[:BATCH]
        state, _ = step(state, dict(image=images[at], label=labels[at]), frozen)
    return state["params"]


def measured(model, params):
    """(the method's own loss, test accuracy)."""
    images, labels = images_of("test")
    targets = jax.nn.one_hot(labels, 10)

    @jax.jit
    def of(params):
        pixels = CARD.normalize(jnp.asarray(images))
        logits, _ = model.apply({"params": params}, pixels)
        rngs = dict(dropout=jax.random.key(0))
        trained, out = model.apply({"params": params}, pixels, train=True, rngs=rngs)
        own = losses.reported(out["aux"], targets)
        if not {"loss", "logits"} & set(out["aux"]):
            own = losses.cross_entropy(trained, targets)
        return jnp.mean(own), jnp.mean(jnp.argmax(logits, axis=-1) == labels)

    return tuple(map(float, of(params)))


@functools.cache
def dense():
    """The dense model and its parameters after training."""
    model = build_model("vit", **SIZES)
    params = jax.jit(lambda key: init_params(model, key))(jax.random.key(0))
    return model, train(model, params, DENSE_STEPS)


def follow(spec, count=STEPS):
    """Figures of one method, and the reduced model that was evaluated."""
    plan, settings = METHODS[spec]
    model = build_model("vit", **SIZES, **plan, reducer=spec)
    fresh = jax.jit(lambda key: init_params(model, key))(jax.random.key(1))
    params = {
        name: tree | {k: v for k, v in fresh[name].items() if k == "reduction"}
        if name.startswith("blocks")
        else tree
        for name, tree in dense()[1].items()
    }
    before = measured(model, params)
    teacher = dense() if spec.startswith("dynamicvit") else None
    params = train(model, params, count, teacher=teacher, **settings)
    after = measured(model, params)
    if isinstance(model.reducer, DiffRateSearch):
        model = model.clone(reducer=model.reducer.evaluated, keep=learned_counts(params, model))
        after = after[0], measured(model, params)[1]
    return dict(loss=(before[0], after[0]), top1=(before[1], after[1])), model


def main() -> None:
    print(f"dense: {100 * measured(*dense())[1]:.2f} %, {macs(dense()[0]) / 1e6:.2f} M", flush=True)
    rows = [["method", "M multiply-accumulates", "own loss", "test top-1, %", "tokens"]]
    for spec in sys.argv[1:] or METHODS:
        figures, model = follow(spec)
        rows.append(
            [
                spec,
                f"{macs(model) / 1e6:.2f}",
                "{:.4f} -> {:.4f}".format(*figures["loss"]),
                " -> ".join(f"{100 * value:.2f}" for value in figures["top1"]),
                " ".join(map(str, model.tokens_per_block)),
            ]
        )
        print(*rows[-1], flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()
