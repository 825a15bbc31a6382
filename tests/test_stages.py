# SPDX-License-Identifier: Apache-2.0
import pytest

from configs import common
from evit_jax import stages
from evit_jax.errors import InputError
from evit_jax.models import build_model

SIZES = dict(image_size=(16, 16), patch_size=4, width=8, depth=3, num_heads=2, num_classes=3)


def run_of(**changes) -> tuple:
    """(model, config) of a small run at keep rate 0.5."""
    config = common.get_config().unlock()
    config.model.update(SIZES | dict(name="vit", keep_rate=0.5, layers=(1,)))
    config.update_from_flattened_dict(changes)
    return build_model(**config.model), config


def to_steps(epochs):
    return round(10 * epochs)


def test_a_warm_up_falls_to_the_target():
    table = stages.open_table(
        *run_of(**{"keep_warmup.epochs": 2.0, "keep_warmup.rungs": 2}), to_steps
    )
    assert [stage.keep_rate for stage in table] == [1.0, 0.75, 0.5]
    assert [stage.keep[1] for stage in table] == [None, 12, 8]
    assert 0 < table[1].step < table[2].step <= 20


def test_a_sandwich_is_one_stage_for_each_rate_between_and_excludes_a_warm_up():
    table = stages.open_table(*run_of(sandwich=(1.0, 0.75, 0.5)), to_steps)
    assert [(stage.step, stage.keep[1]) for stage in table] == [(0, None)]
    assert [keep[1] for keep in table[0].others] == [12, 8]
    with pytest.raises(InputError, match="takes the place of keep_warmup"):
        stages.open_table(*run_of(**{"sandwich": (1.0, 0.5), "keep_warmup.epochs": 1.0}), to_steps)


@pytest.mark.parametrize(
    ("every", "ends"), [(0, [10]), (2.5, [3, 5, 8, 10]), (4, [4, 8, 10]), (99, [10])]
)
def test_stretches_end_at_the_step_that_fills_them(every, ends):
    assert [step for step in range(1, 11) if stages.completes(step, every, total=10)] == ends


def test_what_is_compared_is_every_rate_trained_and_dense():
    assert list(stages.variants(*run_of())) == ["reduced", "dense"]
    variants = stages.variants(*run_of(sandwich=(1.0, 0.75, 0.5)))
    assert {name: any(model.keep) for name, model in variants.items()} == {
        "0.5": True, "0.75": True, "dense": False,
    }  # fmt: skip
    assert variants["0.5"].tokens_per_block == (17, 10, 10)
