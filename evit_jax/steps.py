# SPDX-License-Identifier: Apache-2.0
"""One training step and one evaluation step, as pure functions that know nothing of devices.

The model is an argument: each stage of the keep-rate warm-up is the same step with another model
over the same parameters. The state is a dict of arrays alone:

    step       int32, steps taken
    params     float32 tree
    opt_state  optax's
    ema        like params, only if averaging is on
    metrics    sums since the last log line; here, so that a resumed run logs the same means
"""

import jax
import jax.numpy as jnp
import optax

from evit_jax import losses, metrics

State = dict


def init_state(params: dict, optimizer: optax.GradientTransformation, *, ema: bool) -> State:
    """The state before the first step."""
    state = dict(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        metrics=metrics.zeros(),
    )
    return state | dict(ema=jax.tree.map(jnp.copy, params)) if ema else state


def batch_shapes(image_size: tuple[int, int], batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes and dtypes of a training batch."""
    return dict(
        image=jax.ShapeDtypeStruct((batch_size, *image_size, 3), jnp.uint8),
        label=jax.ShapeDtypeStruct((batch_size,), jnp.int32),
    )


def eval_params(state: State) -> dict:
    """The parameters to evaluate: the average where there is one."""
    return state.get("ema", state["params"])


def loss_and_metrics(params, batch, key, *, model, preprocessing, label_smoothing):
    """Mean loss of a training batch (image uint8 (B, H, W, 3), label int32 (B,)), metric sums."""
    images = preprocessing.normalise(batch["image"])
    logits, _ = model.apply({"params": params}, images, train=True, rngs={"dropout": key})
    targets = losses.smooth_labels(batch["label"], logits.shape[-1], label_smoothing)
    loss = losses.cross_entropy(logits, targets)
    return jnp.mean(loss), metrics.sums(logits, batch["label"], loss)


def train_step(
    state: State,
    batch: dict[str, jax.Array],
    *,
    model,
    optimizer: optax.GradientTransformation,
    preprocessing,
    label_smoothing: float,
    ema_decay: float,
    seed: int,
) -> tuple[State, jax.Array]:
    """The state after one more batch, and that batch's mean loss before it.

    Its randomness is a function of seed and step alone.
    """
    key = jax.random.fold_in(jax.random.key(seed), state["step"])
    gradient = jax.value_and_grad(loss_and_metrics, has_aux=True)
    (loss, sums), grads = gradient(
        state["params"],
        batch,
        key,
        model=model,
        preprocessing=preprocessing,
        label_smoothing=label_smoothing,
    )
    updates, opt_state = optimizer.update(grads, state["opt_state"], state["params"])
    params = optax.apply_updates(state["params"], updates)
    after = dict(
        step=state["step"] + 1,
        params=params,
        opt_state=opt_state,
        metrics=jax.tree.map(jnp.add, state["metrics"], sums),
    )
    if "ema" in state:
        # Early on the average is shorter, else it would remember the initial weights for long.
        decay = jnp.minimum(ema_decay, (1 + state["step"]) / (10 + state["step"]))
        after["ema"] = optax.incremental_update(params, state["ema"], 1 - decay)
    return after, loss


def eval_step(params: dict, batch: dict[str, jax.Array], *, model, preprocessing) -> dict:
    """Metric sums of a padded batch; `mask` (B,) is False for padding."""
    logits, _ = model.apply({"params": params}, preprocessing.normalise(batch["image"]))
    targets = jax.nn.one_hot(batch["label"], logits.shape[-1])
    loss = losses.cross_entropy(logits, targets)
    return metrics.sums(logits, batch["label"], loss, batch["mask"])
