# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evit_jax.errors import InputError
from evit_jax.models import build_model, init_params
from evit_jax.plan.flops import macs
from evit_jax.reducers import create_reducer
from tests.contracts.test_reducers import BATCH, PATCHES, example
from tests.support.by_hand import attention, slopes

ROWS, COLUMNS = 3, 4


def received(signals, image):
    return attention(signals, image).mean(axis=(0, 1))


def selected(shallow, deep, keep, alpha):
    """Patches in order: anchors, buffers and registers of one image, from scores (n,)."""
    order = sorted(range(len(shallow)), key=lambda patch: -shallow[patch])
    chosen = set()
    for anchor in order[: round(alpha * keep / 5)]:
        row, column = divmod(anchor, COLUMNS)
        for down, right in ((0, 0), (-1, 0), (1, 0), (0, -1), (0, 1)):
            r, c = row + down, column + right
            if 0 <= r < ROWS and 0 <= c < COLUMNS:
                chosen.add(r * COLUMNS + c)
    assert len(chosen) <= keep
    for patch in sorted(range(len(deep)), key=lambda patch: -deep[patch]):
        if len(chosen) < keep:
            chosen.add(patch)
    return sorted(chosen)


def encoder(prefix=1, depth=8):
    """Tokens after an encoder and signals of all its blocks."""
    tokens, _ = example(prefix)
    blocks = tuple(example(prefix, seed=10 + block)[1] for block in range(depth))
    return tokens, blocks[-1].replace(blocks=blocks, class_token=False)


@pytest.mark.parametrize("prefix", [1, 2])
@pytest.mark.parametrize(("keep", "alpha"), [(9, 0.6), (6, 0.0), (8, 0.7), (11, 1.0)])
def test_anchors_buffers_and_registers_are_those_by_hand(prefix, keep, alpha):
    tokens, signals = encoder(prefix)
    after = create_reducer(f"hiprune:alpha={alpha}")(tokens, signals, keep)
    for image in range(BATCH):
        shallow = received(signals.blocks[3], image)[prefix:]  # 3/8 of 8
        deep = received(signals.blocks[7], image)[prefix:]
        patches = selected(shallow, deep, keep, alpha)
        np.testing.assert_array_equal(after.x[image, prefix:], tokens.x[image, prefix:][patches, :])
        np.testing.assert_array_equal(after.size[image], np.ones(prefix + keep))
        owner = [patches.index(patch) if patch in patches else -1 for patch in range(PATCHES)]
        np.testing.assert_array_equal(after.owner[image], owner)


def test_gradients_are_those_of_the_selected_tokens():
    tokens, signals = encoder()
    patches = [
        selected(
            received(signals.blocks[3], image)[1:], received(signals, image)[1:], keep=8, alpha=0.7
        )
        for image in range(BATCH)
    ]

    def loss(x):
        reduced = create_reducer("hiprune:alpha=0.7")(tokens.replace(x=x), signals, 8)
        return jnp.sum(jnp.sin(reduced.x))

    def by_hand(x):
        kept = [[0, *(1 + patch for patch in chosen)] for chosen in patches]
        return sum(np.sin(x[image, kept[image]]).sum() for image in range(BATCH))

    np.testing.assert_allclose(jax.grad(loss)(tokens.x), slopes(by_hand, tokens.x), atol=1e-6)


def looked_at(signals, patches):
    """The signals with attention on these patches, each with more than the next one."""
    logits = np.zeros((BATCH, 2, 1 + PATCHES, 1))
    for number, patch in enumerate(patches):
        logits[:, :, 1 + patch] = 9 - number
    k = jnp.asarray(logits, jnp.float32)
    return signals.replace(q=jnp.ones_like(k), k=k)


def test_the_end_of_a_row_is_no_neighbor_of_the_next_one():
    tokens, signals = encoder(depth=2)
    blocks = (looked_at(signals, [3]), looked_at(signals, [0, 9, 10]))
    after = create_reducer("hiprune:alpha=1")(tokens, blocks[1].replace(blocks=blocks), 6)
    # One anchor at the end of row 0, with neighbors 2 and 7 (not 4), and three registers.
    np.testing.assert_array_equal(np.flatnonzero(after.owner[0] >= 0), [0, 2, 3, 7, 9, 10])
    np.testing.assert_array_equal(after.owner[0][after.owner[0] >= 0], range(6))


def test_neighbors_are_found_wherever_patches_now_are():
    tokens, signals = encoder(depth=2)
    # Patches in reverse, and the one below the anchor is gone.
    owner = jnp.broadcast_to(jnp.arange(PATCHES)[::-1].at[7].set(-1), (BATCH, PATCHES))
    tokens = tokens.replace(owner=owner)
    blocks = (looked_at(signals, [PATCHES - 1 - 3]), looked_at(signals, [0]))
    after = create_reducer("hiprune:alpha=1")(tokens, blocks[1].replace(blocks=blocks), 3)
    kept = np.flatnonzero(np.asarray(after.owner[0]) >= 0)
    np.testing.assert_array_equal(kept, [2, 3, PATCHES - 1])


def test_which_block_is_shallow_can_be_chosen():
    tokens, signals = encoder()
    default = create_reducer("hiprune:alpha=1")(tokens, signals, 10)
    third = create_reducer("hiprune:alpha=1,shallow=3")(tokens, signals, 10)
    first = create_reducer("hiprune:alpha=1,shallow=0")(tokens, signals, 10)
    np.testing.assert_array_equal(default.owner, third.owner)
    assert (default.owner != first.owner).any()
    with pytest.raises(InputError, match="shallow is a block from 0 to 7, got 8"):
        create_reducer("hiprune:shallow=8")(tokens, signals, 10)
    with pytest.raises(InputError, match=r"alpha is in \[0, 1\], got 1.5"):
        create_reducer("hiprune:alpha=1.5")


def test_a_model_computes_in_full_and_hands_on_what_was_selected():
    sizes = dict(image_size=32, patch_size=4, width=16, depth=4, num_heads=2, num_classes=3)
    model = build_model("vit", reducer="hiprune:alpha=1", keep_rate=0.25, **sizes)
    assert model.tokens_per_block == (65, 65, 65, 17)
    params = jax.jit(lambda key: init_params(model, key))(jax.random.key(0))
    images = jax.random.normal(jax.random.key(1), (2, 32, 32, 3))
    logits, out = jax.jit(model.apply)({"params": params}, images)
    expected, whole = jax.jit(model.clone(keep=()).apply)({"params": params}, images)
    np.testing.assert_array_equal(logits, expected)
    for image in range(2):
        owner = np.asarray(out["owner"][0][image])
        kept = np.flatnonzero(owner >= 0)
        np.testing.assert_array_equal(owner[kept], range(16))  # in their own order
        np.testing.assert_allclose(
            out["blocks"][-1][image, 1:], whole["blocks"][-1][image, 1 + kept], atol=1e-5
        )
    assert macs(model) - macs(model.clone(keep=())) == 2 * 65**2 * 16
