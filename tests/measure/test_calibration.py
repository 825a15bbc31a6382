# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import evit_jax
from evit_jax.errors import InputError
from evit_jax.measure.blockwise import Blockwise
from evit_jax.measure.calibration import calibrate, cosine_distance, kl_divergence, shifted
from evit_jax.measure.reduction import default_method
from evit_jax.models import build_model, init_params
from evit_jax.plan.flops import macs
from evit_jax.reducers import create_reducer

SIZES = dict(image_size=24, patch_size=4, width=16, depth=4, num_heads=2, num_classes=5)
FEW = SIZES | dict(image_size=16)  # patches, so that a search compiles fewer blocks


def drawn(model):
    """Parameters. Predictions of drawn weights hardly differ between images; these do."""
    params = jax.jit(lambda key: init_params(model, key))(jax.random.key(0))
    return jax.tree.map(lambda a: 3 * a, params)


def run(model, params, images):
    return jax.jit(model.apply)({"params": params}, images)


@pytest.fixture(scope="module")
def dense():
    model = build_model("vit", **SIZES)
    return model, drawn(model)


@pytest.fixture(scope="module")
def few():
    model = build_model("vit", **FEW)
    return model, drawn(model)


@pytest.fixture(scope="module")
def images():
    return np.asarray(jax.random.normal(jax.random.key(1), (16, 24, 24, 3)))


@pytest.mark.parametrize(
    ("reducer", "keep"),
    [
        ("evit", (None, 20, 9, None)),
        ("tome", (30, None, 16, 12)),
        ("ward", (None, 20, 9, 1)),
        ("mctf", (None, 20, 12, None)),  # at the input: it reads the attention of the block before
        ("random", (30, 20, 9, 1)),  # another draw in each block
    ],
)
def test_block_by_block_a_model_gives_what_it_does_as_a_whole(dense, images, reducer, keep):
    model, params = dense
    reducer = create_reducer(reducer)
    planned = model.clone(reducer=reducer, keep=keep)
    parts = Blockwise(planned, params)
    entered, (logits, features) = parts.start(parts.params, images)
    expected, out = run(model, params, images)
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(features, out["features"], rtol=1e-5, atol=1e-5)
    states = {}
    logits, features = parts.answers(reducer, keep, entered, states)
    expected, out = run(planned, params, images)
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(features, out["features"], rtol=1e-5, atol=1e-5)
    assert set(states) == {(reducer, keep[:count]) for count in (1, 2, 3, 4)}


@pytest.mark.parametrize("pool", ["avg", "map"])
def test_a_model_that_pools_patches_is_the_same_block_by_block(images, pool):
    model = build_model("vit", **SIZES, class_token=False, registers=1, pool=pool)
    params = jax.jit(lambda key: init_params(model, key))(jax.random.key(0))
    reducer, keep = create_reducer("ward:by=mean"), (None, 20, 9, 4)
    logits, features = Blockwise(model.clone(reducer=reducer, keep=keep), params).answers(
        reducer, keep, Blockwise(model, params).start(params, images)[0], {}
    )
    planned = model.clone(reducer=reducer, keep=keep)
    expected, out = run(planned, params, images)
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(features, out["features"], rtol=1e-5, atol=1e-5)


def test_blocks_of_the_same_size_are_one_program_and_known_states_are_not_computed_again(
    dense, images
):
    model, params = dense
    parts = Blockwise(model, params)
    entered, _ = parts.start(parts.params, images)
    states = {}
    tome = create_reducer("tome")
    parts.answers(tome, (None,) * 4, entered, states)
    assert len(parts.compiled) == 1
    parts.answers(tome, (None, None, 30, None), entered, states)
    assert len(parts.compiled) == 3  # a block that reduces, and one with fewer tokens


def test_distortions_are_their_formulas():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 3, 5))
    p, q = (np.exp(x) / np.exp(x).sum(1, keepdims=True) for x in (a, b))
    expected = [sum(p[i] * np.log(p[i] / q[i])) for i in range(3)]
    np.testing.assert_allclose(kl_divergence((a, None), (b, None)), expected)
    assert (kl_divergence((a, None), (a, None)) == 0).all()
    x, y = rng.normal(size=(2, 3, 1, 8))
    cosines = [
        x[i, 0] @ y[i, 0] / np.sqrt(x[i, 0] @ x[i, 0] * (y[i, 0] @ y[i, 0])) for i in range(3)
    ]
    np.testing.assert_allclose(cosine_distance((None, x), (None, y)), 1 - np.array(cosines))


def test_importance_is_the_squared_gradient_of_drawn_predictions(dense, images):
    _, params = dense
    model = build_model("vit", **SIZES | dict(num_classes=2))
    head = jax.random.normal(jax.random.key(2), (16, 1))
    params = params | dict(head=dict(kernel=jnp.concatenate([head, -head], 1), bias=jnp.zeros(2)))

    class Watching(type(create_reducer("ward"))):
        def evidence(self, tokens, signals, importance):
            return importance

    parts = Blockwise(model, params)
    importance = parts.evidence(Watching(), images[:2], jax.random.key(0))
    # By finite differences of what leaves block 1: log p_0 and log p_1 by their own probability.
    entered, _ = parts.start(parts.params, images[:2])
    state = entered
    for number in range(2):
        state = parts.step(number, create_reducer("evit"), None, state)

    def log_p(x):
        now = (state[0].replace(x=x), state[1])
        for number in (2, 3):
            now = parts.step(number, create_reducer("evit"), None, now)
        return np.asarray(jax.nn.log_softmax(parts.finish(parts.params, now[0])[0]), np.float64)

    token, squares = 7, np.zeros((2, 2))
    for channel in range(16):
        change = jnp.zeros_like(state[0].x).at[:, token, channel].set(1e-2)
        slope = (log_p(state[0].x + change) - log_p(state[0].x - change)) / 2e-2
        squares += slope**2
    got = np.asarray(importance[1][:, token])
    assert (np.min(squares, 1) * 0.98 <= got).all()  # a mean over draws lies between the classes
    assert (got <= np.max(squares, 1) * 1.02).all()


@pytest.mark.parametrize("reducer", ["ward", pytest.param("tome", marks=pytest.mark.slow), "evit"])
def test_the_calibrated_plan_is_the_best_that_was_tried_and_within_the_budget(few, images, reducer):
    (model, params), images = few, images[:, :16, :16]
    calls = []
    found = calibrate(
        model,
        params,
        images,
        share=0.6,
        reducer=reducer,
        batch_size=8,
        progress=lambda done, most: calls.append((done, most)),
    )
    budget = 0.6 * macs(model)
    assert all(tried.macs <= budget for tried in found.tried)
    names = {tried.name for tried in found.tried}
    assert "constant" in names
    assert any(name.startswith("ramp from block") for name in names)
    assert found.best.distortion <= min(tried.distortion for tried in found.tried[:3])
    assert found.model.keep == found.best.keep
    assert calls[-1][0] == calls[-1][1]
    # The plan that was found, run as any other model.
    expected, _ = run(model, params, images)
    logits, _ = run(found.model, params, images)
    each = kl_divergence((expected, None), (logits, None))
    np.testing.assert_allclose(each, found.best.each, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(found.best.distortion, each.mean(), rtol=1e-3)
    if reducer == "ward":
        assert len(found.model.reducer.probe) == model.depth


@pytest.mark.parametrize(
    "changes",
    [
        dict(num_classes=0),
        dict(class_token=False, pool="avg"),
        dict(class_token=False, pool="map", num_classes=0),
        dict(registers=2, no_embed_class=True),
    ],
    ids=["features", "average", "map", "registers"],
)
def test_models_without_head_or_class_token_are_calibrated_by_what_they_return(changes, images):
    model = build_model("vit", **SIZES | dict(depth=3) | changes)
    params = drawn(model)
    reducer = default_method(model)
    assert reducer == ("ward" if model.class_token else "ward:by=mean")
    settings = dict(share=0.7, reducer=reducer, sweeps=0, layers=(1, 2), batch_size=16)
    found = calibrate(model, params, images, **settings)
    assert macs(found.model) <= 0.7 * macs(model)
    assert np.isfinite(found.model.reducer.probe).all()
    # Where nothing reads patches at the end, one is enough.
    assert (found.best.keep[-1] == 1) == (not model.reads_patches)
    expected, _ = run(model, params, images)
    reduced, _ = run(found.model, params, images)
    if model.num_classes:
        change = kl_divergence((expected,), (reduced,))
    else:
        change = cosine_distance((None, expected[:, None]), (None, reduced[:, None]))
        with pytest.raises(InputError, match="this model has no head: cosine"):
            calibrate(model, params, images, distortion="kl", **settings)
    np.testing.assert_allclose(found.best.each, change, rtol=1e-3, atol=1e-6)


def test_a_journal_is_gone_on_with(few, images, tmp_path, monkeypatch):
    (model, params), images = few, images[:, :16, :16]
    asked = dict(share=0.6, reducer="tome", batch_size=8, journal=tmp_path / "tried")
    first = calibrate(model, params, images, **asked)

    def refuse(*_):
        raise AssertionError("measured again")

    monkeypatch.setattr(Blockwise, "answers", refuse)
    again = calibrate(model, params, images, **asked)
    assert again.best.keep == first.best.keep
    with pytest.raises(AssertionError, match="measured again"):  # of other images it says nothing
        calibrate(model, params, -images, **asked)


def test_moving_reduction_between_blocks_stays_within_the_budget(dense):
    model = dense[0].clone(reducer=create_reducer("evit"))
    budget = 0.7 * macs(model)
    keep = model.plan(macs=budget)
    more = shifted(model, keep, 2, 1.5, budget=budget)
    assert macs(model.clone(keep=more)) <= budget
    assert more[2] / (more[1] + 1) < keep[2] / (keep[1] + 1)
    assert more[1] > keep[1]


def test_bad_requests_are_refused_in_one_line(dense, images):
    model, params = dense
    with pytest.raises(InputError, match="give a budget"):
        calibrate(model, params, images)
    with pytest.raises(InputError, match="at least 8 images, got 3"):
        calibrate(model, params, images[:3], share=0.6)
    with pytest.raises(InputError, match="distortion must be kl or cosine"):
        calibrate(model, params, images, share=0.6, distortion="l2")
    with pytest.raises(InputError, match="costs at most"):
        calibrate(model, params, images, macs=1.0)
    with pytest.raises(InputError, match="works after the last block"):
        calibrate(model, params, images, share=0.6, reducer="hiprune")


def test_reduce_says_what_it_did(few, images, capsys):
    (model, params), images = few, images[:, :16, :16]
    reduced = evit_jax.reduce(model, params, share=0.6)
    assert macs(reduced) <= 0.6 * macs(model)
    said = capsys.readouterr().out
    assert said.startswith("ward: tokens ")
    assert f"{macs(reduced) / macs(model):.0%}" in said
    calibrated = evit_jax.reduce(model, params, method="tome", share=0.7, images=images)
    assert "tome, calibrated: tokens " in capsys.readouterr().out
    assert macs(calibrated) <= 0.7 * macs(model)
    with pytest.raises(InputError, match="nothing would be reduced"):
        evit_jax.reduce(model, params, share=1.0)
    with pytest.raises(InputError, match="nothing would be reduced"):
        evit_jax.reduce(model, params, method="evit")


def test_a_method_that_learns_is_refused_without_its_parameters(dense, images):
    model, params = dense
    with pytest.raises(InputError, match="PatchMerger learns, and these parameters are of no"):
        evit_jax.reduce(model, params, method="patchmerger", share=0.6)
    with pytest.raises(InputError, match="PatchMerger has learned for the plan"):
        evit_jax.reduce(model, params, method="patchmerger", share=0.6, images=images)
