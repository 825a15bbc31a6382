# SPDX-License-Identifier: Apache-2.0
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evit_jax.errors import InputError
from evit_jax.models import build_model, init_params
from evit_jax.plan.flops import macs
from evit_jax.reducers import as_spec, create_reducer
from tests.contracts.test_reducers import BATCH, PATCHES, WIDTH, example


def by_hand(x, size, score, keep, *, floor=0.1, compared=None):
    """One image, token by token, in float64: (x, size, members) of what is kept, by mass."""
    n = len(x)
    mass = score / score.mean() + floor * size / size.mean()
    order = sorted(range(n), key=lambda i: (-mass[i], i))
    centered = x - x.mean(axis=1, keepdims=True)
    cost = {}
    for place, i in enumerate(order):
        if place < n - (n if compared is None else compared):
            continue
        for j in order[:place]:
            cosine = centered[i] @ centered[j]
            cosine /= np.linalg.norm(centered[i]) * np.linalg.norm(centered[j])
            joined = mass[i] * mass[j] / (mass[i] + mass[j])
            cost[i, j] = joined * max(1 - cosine, 1e-6)
    cheapest = {i: min(cost[i, j] for k, j in cost if k == i) for i, _ in cost}
    removed = sorted(cheapest, key=lambda i: cheapest[i])[: n - keep]
    members = {i: [i] for i in order if i not in removed}
    for i in removed:
        hosts = {j: cost[i, j] for k, j in cost if k == i and j not in removed}
        members[min(hosts, key=hosts.get)].append(i)
    merged = []
    for group in members.values():
        weights = mass[group] / mass[group].sum()
        mean = weights @ x[group]
        if len(group) > 1:
            length = weights @ np.linalg.norm(x[group], axis=1)
            mean = mean * length / np.linalg.norm(mean)
        merged.append(mean)
    sizes = np.array([size[group].sum() for group in members.values()])
    return np.stack(merged), sizes, list(members.values())


@pytest.mark.parametrize("by", ["class", "received", "shift"])
@pytest.mark.parametrize("keep", [3, 7, 11])
def test_merging_is_the_formula_by_hand(keep, by):
    tokens, signals = example()
    sizes = jnp.asarray(np.random.default_rng(1).integers(1, 5, (BATCH, 1 + PATCHES)), jnp.float32)
    tokens = tokens.replace(size=sizes.at[:, 0].set(1))
    after = create_reducer(dict(name="ward", by=by))(tokens, signals, keep)
    score = dict(
        received=signals.received_attention(),
        shift=signals.shift(),
        **{"class": signals.class_attention()},
    )[by]
    for image in range(BATCH):
        x, size, each = (
            np.asarray(a[image, 1:], np.float64) for a in (tokens.x, tokens.size, score)
        )
        expected, total, members = by_hand(x, size, each, keep)
        np.testing.assert_allclose(after.x[image, 1:], expected, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(after.size[image, 1:], total)
        np.testing.assert_array_equal(after.weight[image], after.size[image])
        for place, group in enumerate(members):
            assert set(np.asarray(after.owner[image])[group]) == {place}


def test_only_the_candidates_of_least_mass_are_removed():
    tokens, signals = example()
    reducer = create_reducer("ward:candidates=0.5")
    after = reducer(tokens, signals, 9)
    for image in range(BATCH):
        x, size = (np.asarray(a[image, 1:], np.float64) for a in (tokens.x, tokens.size))
        score = np.asarray(signals.class_attention()[image, 1:], np.float64)
        expected, _, _ = by_hand(x, size, score, 9, compared=6)
        np.testing.assert_allclose(after.x[image, 1:], expected, rtol=1e-5, atol=1e-5)
    # Half of the tokens, or half as many again as are removed, but no more than there are.
    assert [reducer.compared(12, keep) for keep in (11, 8, 6, 2)] == [6, 6, 9, 12]
    assert reducer.matching_macs(12, 9, 1, WIDTH, 1) == 6 * 12 * WIDTH
    assert create_reducer("ward").matching_macs(12, 9, 1, WIDTH, 1) == 12 * 12 * WIDTH
    whole_map = create_reducer("ward:by=received").matching_macs(12, 9, 1, WIDTH, 1)
    assert whole_map == (12 * 12 + 13 * 13) * WIDTH


def test_gradients_are_those_of_the_means_with_the_matching_fixed():
    tokens, signals = example()
    reducer, keep = create_reducer("ward"), 7

    def loss(x):
        return jnp.sum(jnp.sin(reducer(tokens.replace(x=x), signals, keep).x))

    got = np.asarray(jax.grad(loss)(tokens.x))
    x, size = np.asarray(tokens.x[0, 1:], np.float64), np.ones(PATCHES)
    score = np.asarray(signals.class_attention()[0, 1:], np.float64)
    step = 1e-6
    for patch, channel in ((0, 0), (5, 2), (11, 4)):
        moved = []
        for sign in (1, -1):
            changed = x.copy()
            changed[patch, channel] += sign * step
            moved.append(np.sin(by_hand(changed, size, score, keep)[0]).sum())
        expected = (moved[0] - moved[1]) / (2 * step)
        np.testing.assert_allclose(got[0, 1 + patch, channel], expected, rtol=1e-4, atol=1e-5)


def test_a_probe_says_how_much_a_token_matters():
    tokens, signals = example()
    tokens = tokens.replace(size=tokens.size.at[:, 3].set(4.0))
    probe = np.random.default_rng(0).normal(size=(2, 1 + WIDTH))
    reducer = dataclasses.replace(create_reducer("ward"), probe=tuple(map(tuple, probe.tolist())))
    mass = reducer.mass(tokens, signals.replace(layer=1))
    x = np.asarray(tokens.x[:, 1:], np.float64)
    normal = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    score, size = (
        np.asarray(a[:, 1:], np.float64) for a in (signals.class_attention(), tokens.size)
    )
    score = score / score.mean(axis=1, keepdims=True)
    logarithm = probe[1, 0] * np.log((score + 1e-9) / size) + normal @ probe[1, 1:]
    expected = np.exp(logarithm) * size
    expected = expected / expected.mean(axis=1, keepdims=True)
    expected += 0.1 * size / size.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(mass, expected, rtol=1e-4)  # exponentials of sums of logarithms


def test_a_probe_is_learned_from_evidence_and_can_be_written_down():
    tokens, signals = example(batch=64)
    reducer = create_reducer("ward")
    features = np.asarray(reducer.features(tokens, signals), np.float64)
    truth = np.random.default_rng(0).normal(size=1 + WIDTH)
    # Importance is a square, the mass a length.
    importance = jnp.pad(jnp.asarray(np.exp(2 * features @ truth)), ((0, 0), (1, 0)))
    evidence = reducer.evidence(tokens, signals, importance)
    learned = reducer.learned([jax.tree.map(np.asarray, evidence)])
    # The ridge shrinks it a little, and what is below a ten-thousandth is cut off.
    np.testing.assert_allclose(learned.probe[0], truth, atol=0.15)
    assert create_reducer(as_spec(learned)) == learned
    assert hash(learned) is not None
    assert "probe" not in repr(learned)


def test_a_budget_is_met_by_a_ramp_that_ends_in_one_patch():
    sizes = dict(image_size=32, patch_size=4, width=16, depth=12, num_heads=2, num_classes=3)
    dense = build_model("vit", **sizes)
    for share in (0.8, 0.6, 0.4):
        model = build_model("vit", **sizes, reducer="ward", macs=share * macs(dense))
        assert 0.97 * share < macs(model) / macs(dense) <= share
        kept = [entry for entry in model.kept if entry is not None]
        assert kept[-1] == 1
        assert kept == sorted(kept, reverse=True)
        assert model.kept[0] is None or share == 0.4


def test_equal_tokens_are_joined_without_loss():
    sizes = dict(image_size=16, patch_size=4, width=16, depth=3, num_heads=2, num_classes=3)
    model = build_model("vit", **sizes, reducer="ward", tokens=(None, 3, None))
    params = init_params(model, jax.random.key(0))
    params["pos_embed"] = jnp.zeros_like(params["pos_embed"])
    images = jnp.ones((2, 16, 16, 3))  # so that all patches are the same token
    logits, out = model.apply({"params": params}, images)
    expected, _ = model.clone(keep=()).apply({"params": params}, images)
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)
    assert out["size"].sum() == 2 * (1 + 16)


def test_an_unknown_score_is_refused():
    with pytest.raises(InputError, match="unknown score 'clas'; did you mean 'class'"):
        create_reducer("ward:by=clas")
