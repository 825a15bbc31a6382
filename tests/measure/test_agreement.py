# SPDX-License-Identifier: Apache-2.0
"""Figures of models beside their dense twin, by NumPy in float64, and what can be compared."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evit_jax.errors import InputError
from evit_jax.measure import agreement, agreement_report
from evit_jax.measure.agreement import DENSE, Figures, frontier, standard_error, summary
from evit_jax.measure.candidates import candidates, dense_twin, written
from evit_jax.plan.flops import macs
from evit_jax.reducers import known_reducers
from evit_jax.runtime.parallel import DataParallel
from evit_jax.training.trained import spec_of_name

SIZES = "vit:image_size=32,patch_size=4,width=16,depth=6,num_heads=2,num_classes=10"


def softmax(x):
    x = np.exp(x - x.max(axis=1, keepdims=True))
    return x / x.sum(axis=1, keepdims=True)


def divergence(dense, logits):
    p, q = (softmax(np.asarray(x, np.float64)) for x in (dense, logits))
    return np.sum(p * np.log(p / q), axis=1)


def test_figures_of_images_are_those_of_numpy():
    rng = np.random.default_rng(0)
    dense = rng.normal(0, 2, (20, 10)).astype(np.float32)
    logits = dense + rng.normal(0, 1, dense.shape).astype(np.float32)
    labels = rng.integers(0, 10, 20)
    found = agreement.image_figures(jnp.asarray(logits), jnp.asarray(labels), jnp.asarray(dense))
    np.testing.assert_array_equal(found["hit"], logits.argmax(axis=1) == labels)
    np.testing.assert_array_equal(found["same"], logits.argmax(axis=1) == dense.argmax(axis=1))
    np.testing.assert_allclose(found["kl"], divergence(dense, logits), rtol=1e-5)


def test_a_small_divergence_is_not_lost_to_rounding():
    dense = np.random.default_rng(0).normal(0, 3, (8, 1000)).astype(np.float32)
    logits = dense + np.random.default_rng(1).normal(0, 0.01, dense.shape).astype(np.float32)
    labels = jnp.zeros(8, jnp.int32)
    found = agreement.image_figures(jnp.asarray(logits), labels, jnp.asarray(dense))["kl"]
    np.testing.assert_allclose(found, divergence(dense, logits), atol=1e-6)
    same = agreement.image_figures(jnp.asarray(dense), labels, jnp.asarray(dense))
    assert np.all(np.asarray(same["kl"]) == 0)


def test_errors_are_those_of_paired_differences():
    dense = Figures(0.5, 1.0, np.array([1, 1, 0, 0], bool), np.ones(4, bool), np.zeros(4))
    kl = np.array([0.1, 0.3, 0.2, 0.8])
    model = Figures(0.5, 1.0, np.array([1, 0, 1, 0], bool), np.array([1, 1, 1, 0], bool), kl)
    row = summary(model, dense)
    assert (row["won"], row["lost"], row["agreement"]) == (1, 1, 0.75)
    # Differences 0, -1, 1, 0: their variance is 2 / 3, that of their mean a quarter of it.
    assert row["top1_error"] == pytest.approx(np.sqrt(2 / 3 / 4))
    assert row["kl"] == pytest.approx(0.35)
    assert row["kl_error"] == pytest.approx(np.sqrt(np.sum((kl - 0.35) ** 2) / 3 / 4))
    assert row["agreement_error"] == pytest.approx(np.sqrt(0.75 / 3 / 4))
    unlabeled = summary(model, dense, labels=False)
    left_out = {"top1", "top5", "won", "lost", "top1_error"}
    assert {name for name, value in unlabeled.items() if value is None} == left_out
    assert standard_error(np.array([1.0])) is None


def test_the_frontier_is_what_nothing_beats():
    points = [(1, 0.5), (1, 0.6), (2, 0.4), (2, 0.2), (3, 0.1), (3, 0.1), (4, 0.3)]
    assert frontier(points) == [True, False, False, True, True, True, False]
    assert frontier([(1.0, 0.5), (1.009, 0.4)]) == [False, True]  # of one budget
    assert frontier([(1.0, 0.5), (1.011, 0.4)]) == [True, True]


def test_dense_logits_are_computed_once_and_padding_is_left_out():
    calls = {DENSE: 0, "twice": 0}

    def program(name):
        def call(batch):
            calls[name] += 1
            assert ("dense" in batch) == (name != DENSE)
            logits = batch["image"].astype(jnp.float32) * (1 if name == DENSE else 2)
            images = agreement.image_figures(logits, batch["label"], batch.get("dense", logits))
            count = jnp.sum(batch["mask"]).astype(jnp.float32)
            sums = dict(images=count, loss=count, top1=count, top5=count)
            return dict(sums=sums, logits=logits, images=images | dict(mask=batch["mask"]))

        return call

    def batches():
        rng = np.random.default_rng(0)
        for mask in ([True] * 4, [True, False, True, False]):
            yield dict(
                image=rng.integers(0, 3, (4, 5)).astype(np.uint8),
                label=np.zeros(4, np.int32),
                mask=np.array(mask),
                index=np.arange(4),
                damaged=np.zeros(4, bool),
            )

    figures, first = agreement.beside_dense(
        batches(), {name: program(name) for name in calls}, DataParallel()
    )
    assert calls == {DENSE: 2, "twice": 2}
    images = np.concatenate([batch["image"][batch["mask"]] for batch in batches()]).astype(float)
    np.testing.assert_allclose(figures["twice"].kl, divergence(images, 2 * images), rtol=1e-4)
    assert figures["twice"].same.all()
    np.testing.assert_array_equal(first["dense"], next(batches())["image"])


@pytest.fixture(scope="module")
def spec():
    return spec_of_name(SIZES)


def test_every_method_that_meets_a_budget_is_a_candidate(spec):
    dense = dense_twin(spec)
    budget = 0.6 * macs(dense)
    found, left_out = candidates(spec, dense, budgets=[budget])
    assert {one.method for one in found} | set(left_out) == set(known_reducers())
    assert {"evit", "tome", "random", "ward"} <= {one.method for one in found}
    assert "window" in left_out  # its grid decides
    for one in found:
        if one.model is not None:
            assert macs(one.model) <= budget
            assert one.model.clone(keep=(), reducer=dense.reducer) == dense.clone(keep=())


def test_a_named_method_that_meets_no_budget_says_why(spec):
    dense = dense_twin(spec)
    budgets = [0.1 * macs(dense), 0.7 * macs(dense), 2 * macs(dense)]
    methods = ["window", "tome:r=4", "evit"]
    found, left_out = candidates(spec, dense, methods=methods, budgets=budgets, plans=["own"])
    assert left_out == []
    refused = {(one.method, one.budget): one.reason for one in found if one.model is None}
    assert "a schedule of its own" in refused["window", budgets[1]]
    assert "a schedule of its own" in refused["tome:r=4", budgets[0]]
    assert "the fewest possible" in refused["evit", budgets[0]]
    assert all("\n" not in reason for reason in refused.values())
    assert ("evit", budgets[1]) not in refused
    (all_of_it,) = [one for one in found if one.method == "evit" and one.budget == budgets[2]]
    assert all_of_it.model is dense
    with pytest.raises(InputError, match="did you mean 'tome'"):
        candidates(spec, dense, methods=["tomme"], budgets=budgets)
    with pytest.raises(InputError, match="unknown plan 'constnt'; did you mean 'constant'"):
        candidates(spec, dense, methods=["evit"], budgets=budgets, plans=["constnt"])


def test_one_rate_is_another_plan_where_a_method_has_its_own(spec):
    dense = dense_twin(spec)
    budget = 0.6 * macs(dense)
    own, one_rate, *evit = candidates(spec, dense, methods=["ward", "evit"], budgets=[budget])[0]
    assert (own.plan, one_rate.plan) == ("own", "constant")
    assert own.model.keep != one_rate.model.keep
    assert evit[0].model == evit[1].model
    n = dense.patches
    for keep in one_rate.model.keep:  # each keeps the same share of what it gets
        assert keep / n == pytest.approx(one_rate.model.keep[0] / dense.patches, abs=1 / n)
        n = keep


def test_a_plan_in_a_file_is_in_the_smallest_budget_that_holds_it(spec, tmp_path):
    dense = dense_twin(spec)
    path = tmp_path / "plan.json"

    def of(content, budgets=(0.5, 0.9)):
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        budgets = [share * macs(dense) for share in budgets]
        (one,), _ = candidates(
            spec, dense, methods=["evit"], budgets=budgets, plans=(), files=[str(path)]
        )
        return one, budgets

    tokens = [None, 40, None, 20, None, None]
    one, budgets = of(dict(reducer=dict(name="evit", fuse=False), tokens=tokens))
    assert (one.method, one.plan, one.model.keep) == ("evit:fuse=False", str(path), tuple(tokens))
    assert one.budget == budgets[1]
    assert of(dict(reducer="evit", tokens=tokens), (0.1,))[0].budget is None
    for content, text in [
        ("[]", "is no plan"),
        ("{", "is no plan"),
        (dict(reducer="evit"), "is no plan"),
        (dict(reducer="evti", tokens=tokens), "did you mean 'evit'"),
        (dict(reducer="evit", tokens=[70] + [None] * 5), "can keep 1 to 64"),
    ]:
        with pytest.raises(InputError, match=r"plan\.json") as error:
            of(content)
        assert text in str(error.value)
    with pytest.raises(InputError, match="is not a file"):
        candidates(spec, dense, methods=["evit"], budgets=[], files=["none.json"])
    assert written("tome:r=1") == "tome:r=1"
    assert written(dict(name="tome")) == "tome"


def row(method, plan, budget, cost, kl, **fields):
    return dict(
        method=method, plan=plan, budget=budget, tokens=(17,), macs=cost, top1=0.5, top5=0.75,
        won=1, lost=2, top1_error=0.01, agreement=0.9, agreement_error=0.02, kl=kl, kl_error=0.003,
        images_per_second=12.0, on_frontier=False,
    ) | fields  # fmt: skip


def test_the_table_groups_budgets_and_puts_the_best_first():
    rows = [
        row(DENSE, None, None, 2e9, 0.0, top1=0.52),
        row("evit", "own", 1e9, 0.99e9, 0.4),
        row("evit", "constant", 1e9, 0.99e9, 0.4),
        row("ward", "own", 1e9, 0.98e9, 0.1, on_frontier=True),
        row("tome", "plans/fitted.json", 5e8, 4e8, 0.7),
    ]
    refused = [
        dict(method="tome", plan=plan, budget=budget, reason="it cannot")
        for budget in (5e8, 1e9)
        for plan in ("own", "constant")
    ]
    lines = agreement_report.text(rows, refused).splitlines()
    first = [" ".join(line.split()[:2]) for line in lines]
    assert first[2:8] == [
        "dense 2",
        "within 0.5",
        "tome fitted",
        "within 1",
        "ward own",
        "evit own",
    ]
    assert "own = constant" in lines[7]
    assert "0.1000 ± 0.0030" in lines[6]
    assert "-2.00 ± 1.00" in lines[6]
    assert "*" in lines[6].split()
    assert lines[-1] == (
        "not compared: tome (own within 0.5 GMACs, constant within 0.5 GMACs, own within 1 GMACs, "
        "constant within 1 GMACs): it cannot"
    )
    unlabeled = [
        one | dict.fromkeys(("top1", "top5", "won", "lost", "top1_error", "images_per_second"))
        for one in rows
    ]
    heading = agreement_report.text(unlabeled, []).splitlines()[0]
    assert "same class" in heading
    assert not any(name in heading for name in ("top-1", "top-5", "won", "images/s"))
    assert agreement_report.picture(unlabeled, title="").size[0] > 800


def test_logits_of_a_step_are_the_models(spec):
    model = dense_twin(spec)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    rng = np.random.default_rng(0)
    batch = dict(
        image=rng.integers(0, 256, (4, 32, 32, 3)).astype(np.uint8),
        label=np.arange(4, dtype=np.int32),
        mask=np.array([True, True, True, False]),
    )
    card = agreement.Preprocessing()
    step = jax.jit(lambda p, b: agreement.step(p, b, model=model, preprocessing=card))
    found = step(params, batch)
    logits, _ = jax.jit(model.apply)(dict(params=params), card.normalize(batch["image"]))
    np.testing.assert_allclose(found["logits"], logits, atol=1e-5)
    assert found["sums"]["images"] == 3
    np.testing.assert_array_equal(found["images"]["kl"], 0)
