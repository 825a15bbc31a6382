# SPDX-License-Identifier: Apache-2.0
"""What makes no difference to any file in reducers/: the order of patches, padding, other values.

A new file is tested by being there. One that is by its definition an exception is listed here.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from evit_jax.errors import InputError
from evit_jax.reducers import create_reducer, known_reducers
from tests.contracts.test_reducers import (
    BATCH,
    FIXED_COUNT,
    PATCHES,
    WIDTH,
    but_for,
    call,
    every_reducer,
    example,
    file_name,
    signals_of,
)

# Exceptions by file name, each with its reason.
USES_PLACES = {
    "gtp": "joins neighbors in the grid",
    "hiprune": "takes the neighbors of a patch in the grid",
    "mctf": "pairs even places with odd ones",
    "random": "draws places, not patches",
    "stvit": "starts from regions of the grid",
    "tofu": "pairs even places with odd ones",
    "tome": "pairs even places with odd ones",
    "window": "pools neighbors in the grid",
}
MINDS_EMPTY_SLOTS: dict[str, str] = {}


def ranks_by_class_attention(reducer):
    """Whether it has nothing to go by without a class token."""
    tokens, signals = example()
    try:
        call(reducer, tokens, signals.replace(class_token=False), 5)
    except InputError as error:
        return "no class token" in str(error)
    return False


@but_for(FIXED_COUNT | USES_PLACES)
def test_patches_in_another_order_are_grouped_alike(reducer):
    tokens, signals = example()
    order = np.random.default_rng(4).permutation(PATCHES)  # new patch i was patch order[i]
    index = np.concatenate([[0], 1 + order])
    keep = max(7, reducer.smallest(PATCHES, 1))
    before = call(reducer, tokens, signals, keep)
    shuffled = tokens.replace(x=tokens.x[:, index])
    after = call(reducer, shuffled, signals_of(signals, index), keep)
    for image in range(BATCH):
        expected, owner = np.asarray(before.owner[image])[order], np.asarray(after.owner[image])
        np.testing.assert_array_equal(owner < 0, expected < 0)
        together = expected[:, None] == expected  # in one token, whichever its place now is
        np.testing.assert_array_equal(owner[:, None] == owner, together)
        for name in ("x", "size"):
            now, then = (np.asarray(getattr(t, name)[image, 1:]) for t in (after, before))
            for patch in np.flatnonzero(owner >= 0):  # sums may be taken in another order
                np.testing.assert_allclose(
                    now[owner[patch]], then[expected[patch]], rtol=1e-5, atol=1e-6
                )


@pytest.mark.parametrize("name", sorted({*known_reducers()} - {*FIXED_COUNT, *MINDS_EMPTY_SLOTS}))
def test_empty_slots_take_no_place_where_class_attention_decides(name):
    reducer = create_reducer(name)
    tokens, signals = example()
    if not ranks_by_class_attention(reducer):
        pytest.skip("it does without class attention")
    full = np.ones(1 + PATCHES)
    full[[1, 5, 6, 12]] = 0  # the first, the last and two in the middle
    there = jnp.asarray(np.tile(full, (BATCH, 1)), jnp.float32)
    padded = tokens.replace(
        x=jnp.where(there[..., None] > 0, tokens.x, 100),  # whatever they hold
        size=there,
        weight=there,
        owner=jnp.where(there[:, 1:] > 0, tokens.owner, -1),
    )
    real = np.flatnonzero(full)
    new_place = jnp.asarray(np.where(full[1:], np.cumsum(full[1:]) - 1, -1), jnp.int32)
    alone = padded.replace(
        x=tokens.x[:, real],
        size=there[:, real],
        weight=there[:, real],
        owner=jnp.broadcast_to(new_place, (BATCH, PATCHES)),
    )
    after = call(reducer, padded, signals.replace(weight=padded.weight), 5)
    without = signals_of(signals, real).replace(weight=alone.weight)
    expected = call(reducer, alone, without, 5)
    np.testing.assert_array_equal(after.owner, expected.owner)
    np.testing.assert_array_equal(after.size, expected.size)
    np.testing.assert_allclose(after.x, expected.x, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(after.weight, expected.weight, rtol=1e-6)


@every_reducer
def test_other_values_of_the_same_shape_need_no_new_program(reducer):
    grid, keep = ((2, 6), 3) if file_name(reducer) in FIXED_COUNT else ((3, 4), 10)
    traces = []

    @jax.jit
    def reduced(tokens, signals):
        traces.append(tokens.x.shape)
        return call(reducer, tokens, signals, keep)

    first, second = (reduced(*example(seed=seed, grid=grid)) for seed in (0, 1))
    assert traces == [(BATCH, 1 + PATCHES, WIDTH)]
    assert reduced._cache_size() == 1
    assert (first.x != second.x).any()


@but_for(FIXED_COUNT)
def test_a_batch_may_be_of_any_size(reducer):
    """As exported programs ask for it: a size that is no number where the program is traced."""
    tokens, signals = example()
    size = export.symbolic_shape("batch")[0]
    shapes = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct((size, *a.shape[1:]), a.dtype), (tokens, signals)
    )
    after = jax.eval_shape(lambda *args: call(reducer, *args, 9), *shapes)
    assert after.x.shape == (size, 1 + 9 + reducer.extra, WIDTH)
