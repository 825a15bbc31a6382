# SPDX-License-Identifier: Apache-2.0
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evit_jax.errors import InputError
from evit_jax.models import build_model, init_params
from evit_jax.plan.flops import macs
from evit_jax.reducers import create_reducer
from evit_jax.reducers.diffrate_search import first_logits, learned_counts
from tests.contracts.test_reducers import BATCH, PATCHES, example
from tests.support.by_hand import slopes

SIZES = dict(image_size=24, patch_size=4, width=32, depth=4, num_heads=2, num_classes=5)


def around(count, patches, step):
    """Logits of a distribution around a count."""
    return jnp.asarray(-np.abs(np.arange(patches, 0, -step) - count) / 2, jnp.float32)


def two_blocks(train=True, step=1):
    """(reducer, parameters of two blocks, what enters the first, signals of both)."""
    reducer = create_reducer(f"diffrate_search:step={step}")
    tokens, signals = example(train=train)
    _, second = example(seed=1, train=train)
    rng = np.random.default_rng(5)
    count = len(range(0, PATCHES, step))

    def logits(lean):  # to small counts
        return jnp.asarray(rng.normal(0, 0.3, count) + lean * np.arange(count), jnp.float32)

    params = [
        dict(params=dict(prune=logits(prune), merge=logits(merge)))
        for prune, merge in ((-0.4, 0.0), (-0.1, 0.3))
    ]
    return reducer, params, tokens, [signals, second]


def run(reducer, params, tokens, signals, plan, mlp_macs=70):
    for block in (0, 1):
        given = signals[block].replace(
            layer=block, depth=2, plan=plan, mlp_macs=mlp_macs, weight=tokens.weight
        )
        tokens = reducer.apply(params[block], tokens, given, plan[block])
    return tokens


def count_by_hand(logits, step):
    share = np.exp(np.asarray(logits, np.float64))
    return share @ np.arange(PATCHES, 0, -step) / share.sum()


def cost_by_hand(counts, width, mlp_macs):
    """10^9 multiply-accumulates of two blocks that prune and merge to these counts."""
    total, n = 0, PATCHES
    for prune_to, merge_to in counts:
        total += 4 * (n + 1) * width**2 + 2 * (n + 1) ** 2 * width
        total += (merge_to + 1) * mlp_macs + (prune_to - merge_to) * merge_to * width
        n = merge_to
    return total / 1e9


@pytest.mark.parametrize("step", [1, 4])
def test_counts_are_expectations_rounded_up_and_never_rise(step):
    reducer, params, tokens, signals = two_blocks(step=step)
    after = run(reducer, params, tokens, signals, ((9, 8), (7, 6)))
    before = PATCHES
    for block in (0, 1):
        found = [count_by_hand(params[block]["params"][n], step) for n in ("prune", "merge")]
        prune_to = min(np.ceil(found[0]), before)
        expected = [prune_to, min(np.ceil(found[1]), prune_to)]
        np.testing.assert_array_equal(after.aux["counts"][block], [expected] * BATCH)
        before = expected[1]


def test_the_loss_is_the_squared_excess_over_the_plan_and_its_gradient_that_by_hand():
    reducer, params, tokens, signals = two_blocks()
    reducer = reducer.clone(weight=5e12)
    plan = ((9, 8), (5, 4))
    after = run(reducer, params, tokens, signals, plan)
    counts = [np.asarray(of[0], np.float64) for of in after.aux["counts"]]
    goal = cost_by_hand(plan, 5, 70)
    expected = 5e12 * (cost_by_hand(counts, 5, 70) - goal) ** 2
    assert len(after.aux["loss"]) == 1
    np.testing.assert_allclose(after.aux["loss"][0], [expected] * BATCH, rtol=1e-4)

    def loss(params):
        return jnp.sum(run(reducer, params, tokens, signals, plan).aux["loss"][0])

    grads = jax.grad(loss)(params)
    flat = [np.asarray(p["params"][n], np.float64) for p in params for n in ("prune", "merge")]
    free = [count_by_hand(logits, 1) for logits in flat]
    for number, logits in enumerate(flat):

        def straight_through(logits, number=number):
            """The cost with this expectation's change on top of its whole count."""
            change = count_by_hand(logits, 1) - free[number]
            moved, before = [], float(PATCHES)
            for block in (0, 1):
                steps = [np.ceil(free[2 * block + i]) for i in (0, 1)]
                if number // 2 == block:
                    steps[number % 2] += change
                prune_to = min(steps[0], before)
                moved.append((prune_to, min(steps[1], prune_to)))
                before = moved[-1][1]
            return 5e12 * BATCH * (cost_by_hand(moved, 5, 70) - goal) ** 2

        found = grads[number // 2]["params"][("prune", "merge")[number % 2]]
        expected = slopes(straight_through, logits)
        scale = np.abs(expected).max()
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * max(scale, 1))


def test_a_tokens_gradient_is_that_of_the_probability_that_the_count_is_above_its_place():
    reducer, params, tokens, signals = two_blocks()
    plan = ((9, 8), (7, 6))
    readout = np.random.default_rng(3).normal(size=(BATCH, PATCHES))
    of_x = np.random.default_rng(4).normal(size=tokens.x[:, 1:].shape)

    def loss(params):
        given = signals[0].replace(plan=plan, depth=2)
        after = reducer.apply(params, tokens, given, plan[0])
        return jnp.sum(after.weight[:, 1:] * readout) + jnp.sum(after.x[:, 1:] * of_x)

    grads = jax.grad(loss)(params[0])["params"]
    after = reducer.apply(params[0], tokens, signals[0].replace(plan=plan, depth=2), plan[0])
    prune_to, merge_to = (int(n) for n in after.aux["counts"][0][0])
    assert merge_to < prune_to < PATCHES, "the example should do both"
    attention = np.asarray(signals[0].class_attention()[:, 1:])
    place = np.argsort(np.argsort(-attention, axis=1), axis=1)
    merged = (place >= merge_to) & (place < prune_to)

    def after_merging(image, left):
        """Weights and x before the mask; what is merged is in its host but for the part `left`."""
        x = np.asarray(tokens.x[image, 1:], np.float64)
        unit = x / np.linalg.norm(x, axis=1, keepdims=True)
        kept = np.flatnonzero(place[image] < merge_to)
        weight, sums, counts = np.ones(PATCHES), x.copy(), np.ones(PATCHES)
        for i in np.flatnonzero(merged[image]):
            cosines = unit[kept] @ unit[i]
            host = kept[cosines.argmax()]
            weight[host] += (1 - left[i]) * cosines.max()
            sums[host] += (1 - left[i]) * x[i]
            counts[host] += 1 - left[i]
        return np.maximum(weight, 1), sums / counts[:, None]

    now = place < merge_to

    def probability(logits):
        share = np.exp(logits) / np.exp(logits).sum()
        return (np.arange(PATCHES, 0, -1) > place[..., None]) @ share

    for name, elsewhere in (("prune", ~merged), ("merge", place < prune_to)):
        own = np.asarray(params[0]["params"][name], np.float64)

        def survival(logits, elsewhere=elsewhere, own=own):
            """The loss with the mask that is, moved as this distribution moves from its own."""
            change = (probability(logits) - probability(own)) * elsewhere
            total = 0.0
            for image in range(BATCH):
                weight, x = after_merging(image, change[image] * merged[image])
                mask = now[image] + change[image]
                total += (readout[image] * weight * mask).sum() + (of_x[image] * x).sum()
            return total

        np.testing.assert_allclose(grads[name], slopes(survival, own), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "kind", [{}, pytest.param(dict(class_token=False, pool="avg"), marks=pytest.mark.slow)]
)
def test_training_computes_what_diffrate_does_with_the_counts_that_were_learned(kind):
    spec = dict(name="diffrate_search") | (dict(by="value") if kind else {})
    model = build_model("vit", reducer=spec, keep_rate=0.7, **SIZES, **kind)
    params = jax.jit(lambda key: init_params(model, key))(jax.random.key(0))
    for block, counts in ((1, (30, 26)), (2, (24, 17)), (3, (13, 9))):
        for name, count in zip(("prune", "merge"), counts, strict=True):
            params[f"blocks_{block}"]["reduction"][name] = around(count, 36, 4)
    keep = learned_counts(params, model)
    assert all(merge_to < prune_to for prune_to, merge_to in keep[1:]), keep
    images = jax.random.normal(jax.random.key(1), (4, 24, 24, 3))
    train = jax.jit(functools.partial(model.apply, train=True))
    masked, out = train({"params": params}, images)
    real = build_model("vit", reducer=model.reducer.evaluated, tokens=keep, **SIZES, **kind)
    reduced, found = jax.jit(real.apply)({"params": params}, images)
    np.testing.assert_allclose(masked, reduced, rtol=0, atol=1e-5)
    np.testing.assert_allclose(out["dense"], found["dense"], rtol=0, atol=1e-4)
    # And its loss is that of what these counts cost.
    excess = (macs(real) - macs(model)) / 1e9
    np.testing.assert_allclose(out["aux"]["loss"][0], [5 * excess**2] * 4, rtol=1e-3)


def test_in_evaluation_it_is_diffrate_with_the_plan():
    model = build_model("vit", reducer="diffrate_search", keep_rate=0.7, **SIZES)
    params = jax.jit(lambda key: init_params(model, key))(jax.random.key(0))
    images = jax.random.normal(jax.random.key(1), (2, 24, 24, 3))
    plain = build_model("vit", reducer="diffrate", keep_rate=0.7, **SIZES)
    assert macs(plain) == macs(model)
    logits, expected = (jax.jit(one.apply)({"params": params}, images)[0] for one in (model, plain))
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-6)


def test_logits_of_zero_are_half_of_the_tokens():
    model = build_model("vit", reducer="diffrate_search", keep_rate=0.7, **SIZES)
    params = jax.jit(lambda key: init_params(model, key))(jax.random.key(0))
    assert params["blocks_1"]["reduction"]["prune"].shape == (9,)
    assert learned_counts(params, model) == (None, (20, 20), None, None)


@pytest.mark.parametrize("step", [1, 4])
def test_from_plan_starts_with_the_plans_counts_and_at_its_cost(step):
    reducer = dict(name="diffrate_search", from_plan=True, step=step)
    tokens = (None, (30, 25), 20, (12, 7))
    model = build_model("vit", reducer=reducer, tokens=tokens, **SIZES)
    params = jax.jit(lambda key: init_params(model, key))(jax.random.key(0))
    assert learned_counts(params, model) == (None, (30, 25), (25, 20), (12, 7))
    images = jax.random.normal(jax.random.key(1), (2, 24, 24, 3))
    _, out = jax.jit(functools.partial(model.apply, train=True))({"params": params}, images)
    np.testing.assert_allclose(out["aux"]["loss"][0], [0, 0], atol=1e-12)


def test_first_logits_are_linear_and_expect_the_count_and_come_close_beyond_the_candidates():
    for count, expected in ((9, 8.5), (20, 19.5), (36, 35.5), (40, 35.5), (2, 4.5)):
        logits = np.asarray(first_logits(36, 4, count), np.float64)
        np.testing.assert_allclose(np.diff(logits, n=2), 0, atol=1e-5)
        share = np.exp(logits - logits.max())
        assert share @ np.arange(36, 0, -4) / share.sum() == pytest.approx(expected, abs=1e-4)
    np.testing.assert_array_equal(first_logits(36, 4, None), np.zeros(9))
    np.testing.assert_array_equal(first_logits(3, 4, 2), [0])


def test_wrong_fields_are_refused():
    with pytest.raises(InputError, match="diffrate_search's step is a number from 1 up"):
        create_reducer("diffrate_search:step=0")
    with pytest.raises(InputError, match="unknown score"):
        create_reducer("diffrate_search:by=clas")
