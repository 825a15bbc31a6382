# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evit_jax.errors import InputError
from evit_jax.models import build_model, init_params
from evit_jax.training import optim

RATES = dict(lr=1e-3, min_lr=1e-5, warmup_lr=1e-6, warmup_steps=10, total_steps=100)
ADAM = dict(weight_decay=0.1, clip_norm=0.0, b1=0.9, b2=0.999)


def test_warm_up_is_linear_and_the_cosine_counts_from_the_first_step():
    schedule = optim.learning_rate(**RATES)
    assert float(schedule(0)) == pytest.approx(1e-6)
    assert float(schedule(5)) == pytest.approx((1e-6 + 1e-3) / 2)
    for step in (10, 50, 99):
        cosine = 1e-5 + (1e-3 - 1e-5) * 0.5 * (1 + np.cos(np.pi * step / 100))
        assert float(schedule(step)) == pytest.approx(cosine, rel=1e-5)
    assert float(schedule(100)) == float(schedule(200)) == pytest.approx(1e-5)


def test_without_warm_up_the_first_rate_is_the_highest():
    assert float(optim.learning_rate(**RATES | dict(warmup_steps=0))(0)) == pytest.approx(1e-3)


def test_only_kernels_decay():
    model = build_model(
        "vit", image_size=8, patch_size=4, width=8, depth=1, num_heads=2, num_classes=3,
        distilled=True,
    )  # fmt: skip
    params = jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0))
    flat = jax.tree_util.tree_leaves_with_path(optim.decayed(params))
    decayed = {"/".join(key.key for key in path) for path, decays in flat if decays}
    assert decayed == {
        "patch_embed/kernel",
        "blocks_0/attn/qkv/kernel",
        "blocks_0/attn/proj/kernel",
        "blocks_0/mlp/fc1/kernel",
        "blocks_0/mlp/fc2/kernel",
        "head/kernel",
        "head_dist/kernel",
    }


def test_a_step_is_adamws():
    optimizer, schedule = optim.create(**RATES | dict(warmup_steps=0), **ADAM)
    params = dict(a=dict(kernel=jnp.asarray([2.0]), bias=jnp.asarray([2.0])))
    grads = dict(a=dict(kernel=jnp.asarray([0.5]), bias=jnp.asarray([0.5])))
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    lr = float(schedule(0))
    # The first step of Adam has length lr whatever the gradient; decay adds lr * 0.1 * weight.
    np.testing.assert_allclose(updates["a"]["bias"], [-lr], rtol=1e-5)
    np.testing.assert_allclose(updates["a"]["kernel"], [-lr * 1.2], rtol=1e-5)


def lamb_by_hand(weights, gradients, rate, *, decay, adapt, steps=2):
    """LAMB's update of one array, step by step; the gradients are clipped already."""
    first = second = np.zeros_like(weights)
    for step in range(1, steps + 1):
        first, second = 0.9 * first + 0.1 * gradients, 0.999 * second + 0.001 * gradients**2
        update = first / (1 - 0.9**step) / (np.sqrt(second / (1 - 0.999**step)) + 1e-6)
        update = update + decay * weights
        trust = np.linalg.norm(weights) / np.linalg.norm(update) if adapt else 1.0
        weights = weights - rate * trust * update
    return weights


def test_lamb_steps_by_the_length_of_what_decays_and_as_adam_elsewhere():
    settings = RATES | dict(warmup_steps=0, min_lr=RATES["lr"]) | ADAM | dict(clip_norm=1.0)
    optimizer, _ = optim.create(**settings, name="lamb")
    kernel, bias = np.array([[3.0, -4.0]]), np.array([0.5, 0.0])
    grads = dict(a=dict(kernel=np.array([[6.0, 0.0]]), bias=np.array([8.0, 0.0])))  # norm 10
    params = jax.tree.map(jnp.asarray, dict(a=dict(kernel=kernel, bias=bias)))
    state = optimizer.init(params)
    for _ in range(2):
        updates, state = optimizer.update(jax.tree.map(jnp.asarray, grads), state, params)
        params = jax.tree.map(jnp.add, params, updates)
    expected = dict(
        kernel=lamb_by_hand(kernel, grads["a"]["kernel"] / 10, 1e-3, decay=0.1, adapt=True),
        bias=lamb_by_hand(bias, grads["a"]["bias"] / 10, 1e-3, decay=0.0, adapt=False),
    )
    for name, array in expected.items():
        np.testing.assert_allclose(params["a"][name], array, rtol=1e-6)


def test_lamb_without_weight_decay_is_adam():
    settings = RATES | dict(warmup_steps=0) | ADAM | dict(weight_decay=0.0)
    params = dict(a=dict(kernel=jnp.asarray([2.0, 3.0]), bias=jnp.asarray([2.0])))
    grads = dict(a=dict(kernel=jnp.asarray([0.5, -0.1]), bias=jnp.asarray([0.5])))
    one, other = (optim.create(**settings, name=name)[0] for name in ("adamw", "lamb"))
    updates = [o.update(grads, o.init(params), params)[0] for o in (one, other)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), *updates)  # 1e-6 eps


def test_an_unknown_optimizer_is_refused():
    with pytest.raises(InputError, match="unknown optimizer 'lam'; did you mean 'lamb'"):
        optim.create(**RATES, **ADAM, name="lam")


def test_clipping_bounds_the_norm_of_all_gradients_together():
    params = dict(a=dict(kernel=jnp.zeros(2), bias=jnp.zeros(1)))
    grads = dict(a=dict(kernel=jnp.asarray([6.0, 0.0]), bias=jnp.asarray([8.0])))
    clipped, _ = optim.create(**RATES, **ADAM | dict(clip_norm=1.0))
    _, state = clipped.update(grads, clipped.init(params), params)
    first_moment = jax.tree.leaves(state)[1:4]
    total = sum(float((moment**2).sum()) for moment in jax.tree.leaves(state[1][0].mu))
    assert total**0.5 == pytest.approx(0.1, rel=1e-5), first_moment  # (1 - b1) * 1


START = jnp.asarray([0.01])
PARAMS = dict(
    blocks_0=dict(
        mlp=dict(kernel=START),
        reduction=dict(out=dict(kernel=START)),
        recovery=dict(fc1=dict(kernel=START)),
    ),
    head=dict(bias=START),
)


def steps_taken(count, **settings):
    """The parameters after each step, of equal gradients."""
    optimizer, _ = optim.create(**RATES | dict(warmup_steps=0), **ADAM, **settings)
    params, state, after = PARAMS, optimizer.init(PARAMS), []
    grads = jax.tree.map(lambda a: 0.25 * a, PARAMS)
    for _ in range(count):
        updates, state = optimizer.update(grads, state, params)
        params = jax.tree.map(jnp.add, params, updates)
        after.append(params)
    return after


def test_the_backbone_moves_by_a_share_and_waits_for_its_start():
    plain, slow = steps_taken(1)[-1], steps_taken(3, backbone_lr=0.01, backbone_start=2)
    for before in slow[:2]:
        assert before["head"]["bias"] == before["blocks_0"]["mlp"]["kernel"] == START
    for name in ("reduction", "recovery"):
        own = jax.tree.leaves(slow[0]["blocks_0"][name])
        np.testing.assert_array_equal(own, jax.tree.leaves(plain["blocks_0"][name]))
    fast = steps_taken(3)
    for of in (lambda p: p["head"]["bias"], lambda p: p["blocks_0"]["mlp"]["kernel"]):
        moved, whole = of(slow[2]) - of(slow[1]), of(fast[2]) - of(fast[1])
        np.testing.assert_allclose(moved, 0.01 * whole, rtol=1e-3)


def test_a_backbone_at_zero_stays_to_the_last_bit_weight_decay_included():
    *_, last = steps_taken(5, backbone_lr=0.0)
    assert last["head"]["bias"] == last["blocks_0"]["mlp"]["kernel"] == START
    assert last["blocks_0"]["reduction"]["out"]["kernel"] != START


def test_a_backbone_apart_needs_a_reducer_that_learns():
    optimizer, _ = optim.create(**RATES, **ADAM, backbone_lr=0.1)
    with pytest.raises(InputError, match="and this model has no such parameters"):
        optimizer.init(dict(head=PARAMS["head"]))
