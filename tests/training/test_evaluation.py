# SPDX-License-Identifier: Apache-2.0
import jax
import numpy as np
import pytest

from evit_jax.data import open_source, pipeline
from evit_jax.models import build_model, init_params, preprocessing
from evit_jax.runtime.parallel import DataParallel
from evit_jax.training.evaluation import Evaluator, run_through

SIZES = dict(image_size=16, patch_size=8, width=16, depth=2, num_heads=2, num_classes=10)


@pytest.fixture(scope="module")
def source():
    return open_source("digits", "test")


def batches_of(source):
    view = dict(size=(16, 16), crop=1.0, interpolation="bicubic", batch_size=100, threads=1)
    return pipeline.eval_batches(source, **view)


def test_several_programs_see_each_image_once(source):
    devices, seen = DataParallel(), []

    def constant(top1):
        def program(batch):
            images = batch["mask"].sum().astype(np.float32)
            hits = dict(loss=2.0, top1=top1, top5=1.0)
            return dict(images=images) | {name: images * value for name, value in hits.items()}

        return program

    scores = run_through(
        batches_of(source),
        dict(a=constant(0.5), b=constant(0.25)),
        devices,
        see=lambda host: seen.extend(host["index"].tolist()),
    )
    assert scores["a"] == dict(test_loss=2.0, test_top1=0.5, test_top5=1.0)
    assert scores["b"]["test_top1"] == 0.25
    assert seen[: len(source)] == list(range(len(source)))


def test_an_interrupted_pass_has_no_result_and_leaves_the_rest_alone(source):
    asked, done = iter([False, True]), []

    def program(batch):
        done.append(batch)
        return dict(images=np.float32(1))

    batches = batches_of(source)
    assert (
        run_through(batches, dict(a=program), DataParallel(), interrupted=lambda: next(asked))
        is None
    )
    assert len(done) == 1
    assert list(batches) == []  # closed


def test_an_average_of_the_weights_and_the_weights_themselves_are_both_evaluated(source):
    model = build_model("vit", **SIZES)
    first, second = (
        jax.jit(lambda key: init_params(model, key))(jax.random.key(seed)) for seed in (0, 1)
    )
    evaluate = Evaluator(
        DataParallel(), preprocessing("vit"), lambda: batches_of(source), lambda host: None
    )
    alone = evaluate(model, dict(params=second))
    assert set(alone) == {"test_loss", "test_top1", "test_top5"}
    both = evaluate(model, dict(params=second, ema=first))
    assert {name: both[f"weights_{name}"] for name in alone} == alone
    assert both["test_loss"] != alone["test_loss"]
    assert evaluate(model, dict(params=first))["test_loss"] == both["test_loss"]
    assert evaluate(model, dict(params=first), interrupted=lambda: True) is None
