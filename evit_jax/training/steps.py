# SPDX-License-Identifier: Apache-2.0
"""One training step and one evaluation step, as pure functions that know nothing of devices.

The models are arguments: each stage of the keep-rate warm-up is the same step with another model
over the same parameters. The state is a dict of arrays alone:

    step       int32, steps taken
    params     float32 tree
    opt_state  optax's
    ema        like params, only if averaging is on
    metrics    sums since the last log line; here, so that a resumed run logs the same means

A step sees the whole batch or, under pmap, one device's part of it and the name of the `axis` over
which to sum. What it draws at random depends on seed, step and each image's place in the whole
batch, so devices, processes and micro-batches change nothing but rounding. Batch norm is the
exception: it normalizes a micro-batch, and under pmap a device's part, by its own statistics.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from evit_jax.errors import InputError, check_name
from evit_jax.models.card import Preprocessing
from evit_jax.runtime.parallel import Chunked, chunk_size
from evit_jax.training import losses, metrics
from evit_jax.training.labeling import TokenLabels
from evit_jax.training.mix import Mix, blend
from evit_jax.training.progressive import coarse_images, coarse_params

State = dict
Batch = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a training step does besides applying the model."""

    preprocessing: Preprocessing
    optimizer: optax.GradientTransformation
    mix: Mix  # random erasing, mixup, cutmix, MixToken
    seed: int = 0
    label_smoothing: float = 0.0
    loss: str = "ce"  # of the class head with the labels, one of `losses.LOSSES`
    labels: TokenLabels | None = None  # what patches learn; None: nothing
    ema_decay: float = 0.0
    accumulate: int = 1  # micro-batches whose gradients are averaged
    distillation: losses.Distillation | None = None
    teacher: object = None  # a Linen module; None where the batch brings the teacher's logits
    teacher_preprocessing: Preprocessing | None = None

    def __post_init__(self):
        check_name("loss", self.loss, losses.LOSSES)
        if self.loss == "bce" and self.label_smoothing:
            raise InputError(
                "loss='bce' learns every class that has a part in the targets, and smoothing gives "
                f"all of them one: set label_smoothing to 0, got {self.label_smoothing}"
            )


def init_state(params: dict, optimizer: optax.GradientTransformation, *, ema: bool) -> State:
    """The state before the first step."""
    state = dict(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        metrics=metrics.zeros(),
    )
    return state | dict(ema=jax.tree.map(jnp.copy, params)) if ema else state


def micro_batches(model, batch_size: int, *, platform: str | None = None) -> int:
    """The number of micro-batches chosen for the device: 1, but see `parallel.chunk_size`.

    Batch norm computes something else in micro-batches, so there nobody but the user asks for them.
    """
    if model.batch_norm:
        return 1
    return batch_size // chunk_size(model, batch_size, train=True, platform=platform)


def batch_shapes(
    image_size: tuple[int, int],
    batch_size: int,
    teacher_classes: int = 0,
    label_map: tuple[int, int, int] | None = None,
) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes and dtypes of a training batch.

    Args:
      teacher_classes: of the logits that come with the images; 0: none do.
      label_map: the shape of the label maps that come with them, None: none do.
    """
    shapes = dict(
        image=jax.ShapeDtypeStruct((batch_size, *image_size, 3), jnp.uint8),
        label=jax.ShapeDtypeStruct((batch_size,), jnp.int32),
    )
    if teacher_classes:
        shapes["teacher"] = jax.ShapeDtypeStruct((batch_size, teacher_classes), jnp.float32)
    if label_map:
        of_map = batch_size, *label_map
        shapes["label_logits"] = jax.ShapeDtypeStruct(of_map, jnp.float16)
        shapes["label_ids"] = jax.ShapeDtypeStruct(of_map, jnp.int16)
        shapes["label_box"] = jax.ShapeDtypeStruct((batch_size, 4), jnp.float32)
    return shapes


def eval_params(state: State) -> dict:
    """The parameters to evaluate: the average where there is one."""
    return state.get("ema", state["params"])


def prepare(
    batch: Batch, index: jax.Array, key: jax.Array, *, model, recipe: Recipe
) -> tuple[jax.Array, dict[str, jax.Array], dict[str, jax.Array]]:
    """What the model sees of a batch and what it learns of it.

    Returns:
      images: normalized, erased and mixed.
      targets: label (B, C) and, where patches have a head, patches (B, P, C), mixed the same way;
        perhaps teacher (B, C).
      given: what else the model is called with: with MixToken `swap`, else nothing.
    """
    images = recipe.preprocessing.normalize(batch["image"])
    classes, smoothing = model.num_classes, recipe.label_smoothing
    patches = recipe.labels is not None and getattr(model, "patch_head", False)
    if "label_box" in batch:
        targets = recipe.labels.targets(batch, classes, model.grid, smoothing)
    else:
        truth = losses.smooth_labels(batch["label"], classes, smoothing)
        targets = dict(label=truth)
        if patches:  # they learn their image's class
            targets["patches"] = jnp.repeat(truth[:, None], model.patches, axis=1)
    if not patches:
        targets.pop("patches", None)
    if "teacher" in batch:
        targets["teacher"] = recipe.distillation.targets(batch["teacher"])
    images, targets = recipe.mix(images, targets, key, index)
    if not recipe.mix.token:
        return images, targets, {}
    box = recipe.mix.random_tokens(key, model.grid)
    weights = {name: ~box[None, :, None] if name == "patches" else own(box) for name in targets}
    given = dict(swap=jnp.broadcast_to(box, (len(images), len(box))))
    return images, jax.tree.map(blend, targets, weights), given


def own(swap: jax.Array) -> jax.Array:
    """The share of an image's own tokens where MixToken swaps these (..., P), a number for all."""
    return 1 - jnp.mean(swap.astype(jnp.float32))


def image_losses(logits: jax.Array, out: dict, targets: dict, recipe: Recipe) -> jax.Array:
    """(B,) losses. A distilled model's class head learns the labels, its other one the teacher.

    What the model's reducers reported is added, see `losses.reported`.
    """
    learn = losses.LOSSES[recipe.loss]
    if "teacher" in targets:
        base = learn(out.get("logits_cls", logits), targets["label"])
        student = out.get("logits_dist", logits)
        loss = recipe.distillation.loss(base, student, targets["teacher"])
    else:
        loss = learn(logits, targets["label"])
    if "tokens" in targets:
        loss = loss + recipe.distillation.token_loss(out, targets["tokens"])
    return loss + losses.reported(out["aux"], targets["label"], learn)


def gradients(
    params: dict,
    frozen: dict,
    batch: Batch,
    index: jax.Array,
    key: jax.Array,
    *,
    models: tuple,
    recipe: Recipe,
    gather: Callable[[dict], dict] = lambda params: params,
) -> tuple[dict, jax.Array, dict, dict]:
    """For images with places `index` (B,): gradients of the mean loss, that loss, metric sums, and
    the running statistics that the first model has afterwards.

    The first model learns from the labels, and the teacher where there is one; the others, which
    run the same parameters with fewer tokens, learn from the first one's logits as well (the
    sandwich rule and in-place distillation of universally slimmable networks, Yu and Huang 2019,
    with the labels kept). Their losses are averaged.
    """
    mix_key, drop_key = jax.random.split(key)
    images, targets, given = prepare(batch, index, mix_key, model=models[0], recipe=recipe)
    if recipe.teacher is not None:
        seen = images
        if recipe.teacher_preprocessing:
            seen = recipe.preprocessing.renormalize(images, recipe.teacher_preprocessing)
        # Without weights of its own the teacher is the student's dense twin.
        variables = {"params": gather(frozen.get("teacher", params))}
        logits, out = recipe.teacher.apply(variables, seen)
        if "patch_logits" in out:  # a training student's are the class head's alone, too
            logits = out["logits_cls"]
        targets["teacher"] = recipe.distillation.targets(logits)
        if recipe.distillation.tokens:
            targets["tokens"] = losses.teacher_tokens(out)
        if given:  # the teacher saw whole images
            targets["teacher"] = blend(targets["teacher"], own(given["swap"]))
            if "tokens" in targets:
                mine = ~given["swap"][..., None]
                targets["tokens"] = jax.tree.map(lambda t: blend(t, mine), targets["tokens"])

    first, total = None, None
    for model in models:

        def objective(params, model=model, first=first):
            rngs = dict(dropout=drop_key)
            variables = {"params": coarse_params(gather(params), model)}
            call = dict(train=True, index=index, rngs=rngs) | given
            logits, out = model.apply(variables, coarse_images(images, model), **call)
            loss = image_losses(logits, out, targets, recipe)
            if "patches" in targets:
                fuses = model.reducer.extra > 0
                loss += recipe.labels.loss(out, targets["patches"], fuses=fuses)
            if first is not None:
                loss = loss + losses.divergence(logits, jax.nn.softmax(first))
            return jnp.mean(loss) / len(models), (loss, logits, out.get("statistics", {}))

        (loss, (each, logits, seen)), grads = jax.value_and_grad(objective, has_aux=True)(params)
        if first is None:
            first, sums = logits, metrics.sums(logits, batch["label"], each)
            total, statistics = (grads, loss), seen
        else:
            total = jax.tree.map(jnp.add, total, (grads, loss))
    return *total, sums, statistics


def train_step(
    state: State,
    batch: Batch,
    frozen: dict,
    *,
    models: tuple,
    recipe: Recipe,
    axis=None,
    gather: Callable[[dict], dict] = lambda params: params,
) -> tuple[State, dict[str, jax.Array]]:
    """The state after one more batch, and figures of that batch before it: loss and grad_norm.

    Args:
      state: see above.
      batch: image (B, H, W, 3) uint8, label (B,) int32, perhaps teacher (B, classes) logits, and
        label maps with the boxes of their crops, see `TokenLabels.targets`.
      frozen: {"teacher": its parameters} or {}.
      models: Linen modules over the same parameters; one, unless several keep rates are trained.
      recipe: everything else.
      axis: of pmap, or None.
      gather: what to do with parameters before a model is applied to them, where devices keep only
        parts of them; see `DataParallel.gather`.
    """
    key = jax.random.fold_in(jax.random.key(recipe.seed), state["step"])
    size = batch["label"].shape[0]
    first = 0 if axis is None else jax.lax.axis_index(axis) * size
    parts = batch, first + jnp.arange(size)

    def one(part):
        settings = dict(models=models, recipe=recipe, gather=gather)
        return gradients(state["params"], frozen, *part, key, **settings)

    if recipe.accumulate == 1:
        grads, loss, sums, statistics = one(parts)
    else:
        parts = jax.tree.map(lambda a: split(a, recipe.accumulate), parts)

        def add(total, part):
            return jax.tree.map(jnp.add, total, one(part)), None

        shapes = jax.eval_shape(one, jax.tree.map(lambda a: a[0], parts))
        zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
        (grads, loss, sums, statistics), _ = jax.lax.scan(add, zeros, parts)
        means = grads, loss, statistics
        grads, loss, statistics = jax.tree.map(lambda a: a / recipe.accumulate, means)
    if axis is not None:
        grads, loss, statistics = jax.lax.pmean((grads, loss, statistics), axis)
        sums = jax.lax.psum(sums, axis)

    updates, opt_state = recipe.optimizer.update(grads, state["opt_state"], state["params"])
    params = replaced(optax.apply_updates(state["params"], updates), statistics)
    after = dict(
        step=state["step"] + 1,
        params=params,
        opt_state=opt_state,
        metrics=jax.tree.map(jnp.add, state["metrics"], sums),
    )
    if "ema" in state:
        # Early on the average is shorter, else it would remember the initial weights for long.
        decay = jnp.minimum(recipe.ema_decay, (1 + state["step"]) / (10 + state["step"]))
        after["ema"] = optax.incremental_update(params, state["ema"], 1 - decay)
    return after, dict(loss=loss, grad_norm=optax.tree.norm(grads))


def replaced(tree: dict, part: dict) -> dict:
    """The tree with the leaves of `part`, a tree of some of its branches, instead of its own."""
    new = {
        key: replaced(tree[key], value) if isinstance(value, dict) else value
        for key, value in part.items()
    }
    return tree | new


def split(array: jax.Array, parts: int) -> jax.Array:
    """(B, ...) -> (parts, B / parts, ...), taking neighboring pairs in turn.

    Pairs stay together because mixup takes them; and every part has images of every device.
    """
    rows = 2 if array.shape[0] % (2 * parts) == 0 else 1
    array = array.reshape(-1, parts, rows, *array.shape[1:])
    return jnp.moveaxis(array, 1, 0).reshape(parts, -1, *array.shape[3:])


def eval_step(params: dict, batch: Batch, *, model, preprocessing, axis=None) -> dict:
    """Metric sums of a padded batch; `mask` (B,) is False for padding."""
    images = preprocessing.normalize(batch["image"])
    logits, _ = Chunked(model).apply({"params": params}, images)
    targets = jax.nn.one_hot(batch["label"], logits.shape[-1])
    loss = losses.cross_entropy(logits, targets)
    sums = metrics.sums(logits, batch["label"], loss, batch["mask"])
    return sums if axis is None else jax.lax.psum(sums, axis)
