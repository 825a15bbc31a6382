# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evit_jax.errors import InputError
from evit_jax.models import build_model, init_params
from evit_jax.plan.flops import macs
from evit_jax.reducers import create_reducer
from tests.contracts.test_reducers import BATCH, PATCHES, example, with_attention
from tests.support.by_hand import attention, slopes, value_norms


def scores_by_hand(signals, image, whole=False):
    maps, norms = attention(signals, image), value_norms(signals, image)
    heads, tokens = norms.shape
    if whole:
        return np.array(
            [
                sum(maps[h, 0, j] for h in range(heads)) * np.sqrt(np.sum(norms[:, j] ** 2))
                for j in range(tokens)
            ]
        )
    return np.array([sum(maps[h, 0, j] * norms[h, j] for h in range(heads)) for j in range(tokens)])


def sampled(scores, keep):
    """For each of the slots the patch that it takes, or None: one image's scores (n,)."""
    order = sorted(range(len(scores)), key=lambda patch: (scores[patch], patch))
    heights, height = [], 0.0
    for patch in order:
        height += scores[patch] / scores.sum()
        heights.append(height)
    low, high = heights[0], heights[-1]
    heights = [(height - low) / (high - low) for height in heights]
    start = min(height for height in heights if height > 0)
    slots = []
    for slot in range(keep):
        point = start + (1 - start) * slot / (keep - 1)
        gaps = [abs(point - height) for height in heights]
        patch = order[gaps.index(min(gaps))]
        slots.append(None if patch in slots else patch)
    return slots


@pytest.mark.parametrize("prefix", [1, 2])
@pytest.mark.parametrize("keep", [3, 6, 11])
@pytest.mark.parametrize("whole", [False, True])
def test_slots_are_the_inverse_of_the_distribution_by_hand(prefix, keep, whole):
    tokens, signals = example(prefix)
    size = np.ones(tokens.size.shape)
    size[:, prefix:] = np.random.default_rng(5).integers(1, 5, (BATCH, PATCHES))
    tokens = tokens.replace(size=jnp.asarray(size, jnp.float32))
    after = create_reducer(f"ats:whole={whole}")(tokens, signals, keep)
    for image in range(BATCH):
        slots = sampled(scores_by_hand(signals, image, whole)[prefix:], keep)
        for slot, patch in enumerate(slots):
            now = prefix + slot
            x = 0 if patch is None else tokens.x[image, prefix + patch]
            np.testing.assert_array_equal(after.x[image, now], jnp.broadcast_to(x, 5))
            expected = 0 if patch is None else size[image, prefix + patch]
            assert after.size[image, now] == expected
            assert after.weight[image, now] == (patch is not None)
        owner = [slots.index(patch) if patch in slots else -1 for patch in range(PATCHES)]
        np.testing.assert_array_equal(after.owner[image], owner)
        np.testing.assert_array_equal(after.weight[image, :prefix], 1)


def test_gradients_are_those_of_the_sampled_tokens():
    tokens, signals = example()
    slots = [sampled(scores_by_hand(signals, image)[1:], 6) for image in range(BATCH)]
    assert any(None in taken for taken in slots)

    def loss(x):
        return jnp.sum(jnp.sin(create_reducer("ats")(tokens.replace(x=x), signals, 6).x))

    def by_hand(x):
        kept = [[0, *(1 + p for p in taken if p is not None)] for taken in slots]
        return sum(np.sin(x[image, kept[image]]).sum() for image in range(BATCH))

    np.testing.assert_allclose(jax.grad(loss)(tokens.x), slopes(by_hand, tokens.x), atol=1e-6)


def test_an_image_with_its_attention_on_few_patches_fills_fewer_slots():
    tokens, signals = example()
    signals = signals.replace(v=jnp.ones_like(signals.v))
    peaked = jnp.asarray([0.1, 0.7, 0.1, *[0.01] * 10])
    even = jnp.asarray([0.1, *np.linspace(0.07, 0.08, 12)])
    attention = jnp.stack([peaked, even, even])
    after = create_reducer("ats")(tokens, with_attention(signals, attention), 10)
    filled = np.asarray((after.size[:, 1:] > 0).sum(axis=1))
    assert filled[0] <= 4
    assert filled[1] == filled[2] >= 9
    assert after.owner[0, 0] >= 0  # the most attended one is always there


def test_attention_on_a_single_patch_or_none_is_no_division_by_zero():
    tokens, signals = example()
    for values in (jnp.zeros_like(signals.v), signals.v.at[:, :, 2:].set(0)):
        after = create_reducer("ats")(tokens, signals.replace(v=values), 5)
        assert np.isfinite(after.x).all()
        assert ((after.size[:, 1:] > 0).sum(axis=1) >= 1).all()
    one = create_reducer("ats")(tokens, signals, 1)
    assert (one.size == 1).all()


def test_later_blocks_do_not_see_empty_slots():
    sizes = dict(image_size=16, patch_size=4, width=16, depth=4, num_heads=2, num_classes=3)
    model = build_model("vit", reducer="ats", tokens=12, layers=(1,), **sizes)
    params = init_params(model, jax.random.key(0))
    # Attention that differs between patches.
    params["blocks_1"]["attn"]["qkv"]["kernel"] *= 60
    images = jax.random.normal(jax.random.key(1), (2, 16, 16, 3))
    logits, out = jax.jit(model.apply)({"params": params}, images)
    empty = np.asarray(out["size"] == 0)
    assert empty.any()
    for row in out["cls_attention"][2:]:
        np.testing.assert_array_equal(np.asarray(row)[empty], 0)
    assert np.isfinite(logits).all()


def test_it_begins_at_a_quarter_of_the_depth_and_costs_nothing_in_pairs_of_tokens():
    assert create_reducer("ats").default_layers(12) == tuple(range(3, 12))
    assert create_reducer("ats").default_layers(2) == (0, 1)
    model = build_model("vit", reducer="ats", tokens=150)
    assert model.tokens_per_block == (*[197] * 3, *[151] * 9)
    assert macs(model) == macs(model.clone(reducer=create_reducer("topk")))
    assert not any(build_model("vit", reducer="ats").keep)


def test_it_needs_a_class_token():
    tokens, signals = example()
    with pytest.raises(InputError, match="the model has no class token"):
        create_reducer("ats")(tokens, signals.replace(class_token=False), 5)
