# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evit_jax.errors import InputError
from evit_jax.reducers import create_reducer
from tests.contracts.test_reducers import BATCH, PATCHES, example
from tests.reducers.test_topk import score_by_hand
from tests.support.by_hand import slopes


@pytest.mark.parametrize("by", ["class", "received", "value", "class_value", "shift"])
def test_the_lowest_scores_are_kept_in_ascending_order(by):
    tokens, signals = example(prefix=2)
    after = create_reducer(f"inverse:by={by}")(tokens, signals, 5)
    for image in range(BATCH):
        scores = score_by_hand(by, signals, image)[2:]
        kept = sorted(range(PATCHES), key=lambda patch: scores[patch])[:5]
        np.testing.assert_array_equal(after.x[image, 2:], tokens.x[image, 2:][kept, :])
        np.testing.assert_array_equal(after.size[image], np.ones(7))
        owner = [kept.index(patch) if patch in kept else -1 for patch in range(PATCHES)]
        np.testing.assert_array_equal(after.owner[image], owner)


def test_gradients_are_those_of_the_kept_tokens():
    tokens, signals = example()
    scores = [score_by_hand("class", signals, image)[1:] for image in range(BATCH)]

    def loss(x):
        return jnp.sum(jnp.sin(create_reducer("inverse")(tokens.replace(x=x), signals, 5).x))

    def by_hand(x):
        kept = [[0, *(1 + np.argsort(scores[image])[:5])] for image in range(BATCH)]
        return sum(np.sin(x[image, kept[image]]).sum() for image in range(BATCH))

    np.testing.assert_allclose(jax.grad(loss)(tokens.x), slopes(by_hand, tokens.x), atol=1e-6)


def test_with_topk_it_shares_out_all_tokens():
    tokens, signals = example()
    high = create_reducer("topk:by=shift")(tokens, signals, 5)
    low = create_reducer("inverse:by=shift")(tokens, signals, PATCHES - 5)
    np.testing.assert_array_equal(high.owner >= 0, low.owner < 0)


def test_empty_slots_are_not_the_least_attended():
    tokens, signals = example()
    weight = jnp.ones(tokens.size.shape).at[:, 3].set(0)
    tokens = tokens.replace(size=weight, weight=weight)
    after = create_reducer("inverse")(tokens, signals.replace(weight=weight), 5)
    assert (after.size == 1).all()


def test_a_whole_attention_map_is_counted_and_class_attention_needs_a_class_token():
    assert create_reducer("inverse").matching_macs(196, 98, 1, 384, 6) == 0
    assert create_reducer("inverse:by=received").matching_macs(196, 98, 1, 384, 6) == 197**2 * 384
    tokens, signals = example()
    with pytest.raises(InputError, match="the model has no class token"):
        create_reducer("inverse")(tokens, signals.replace(class_token=False), 3)
