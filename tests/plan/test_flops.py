# SPDX-License-Identifier: Apache-2.0
import pytest

from evit_jax.models import build_model
from evit_jax.plan.flops import logit_macs, macs

# GMACs computed by hand from the formula of the papers at the reference code's token counts.
EXACT = {
    ("small", True): {1: 4.599, 0.9: 4.022, 0.8: 3.477, 0.7: 3.029, 0.6: 2.635, 0.5: 2.309},
    ("small", False): {0.9: 3.988, 0.8: 3.444, 0.7: 2.997, 0.6: 2.608, 0.5: 2.282},
    ("base", True): {1: 17.564, 0.9: 15.395, 0.8: 13.327, 0.7: 11.610, 0.6: 10.088, 0.5: 8.820},
    ("base", False): {0.9: 15.268, 0.8: 13.201, 0.7: 11.485, 0.6: 9.984, 0.5: 8.716},
    ("tiny", True): {1: 1.254, 0.7: 0.821, 0.5: 0.629},
    ("tiny", False): {0.7: 0.812, 0.5: 0.622},
}
CASES = [(*key, rate, value) for key, rates in EXACT.items() for rate, value in rates.items()]


@pytest.mark.parametrize(("size", "fuse", "rate", "expected"), CASES)
def test_gigamacs_to_the_third_decimal(size, fuse, rate, expected):
    model = build_model(
        f"deit_{size}_patch16_224", keep_rate=rate, reducer=dict(name="evit", fuse=fuse)
    )
    assert macs(model) / 1e9 == pytest.approx(expected, abs=5.1e-4)


@pytest.mark.parametrize(
    ("rate", "published"), [(1, 4.6), (0.9, 4.0), (0.8, 3.5), (0.7, 3.0), (0.6, 2.6), (0.5, 2.3)]
)
def test_deit_small_matches_the_papers_table(rate, published):
    assert round(macs(build_model("deit_small_patch16_224", keep_rate=rate)) / 1e9, 1) == published


@pytest.mark.parametrize(
    ("pixels", "rate", "expected"),
    [(256, 0.6, 3.488), (272, 0.7, 4.56), (288, 0.6, 4.50), (288, 0.5, 3.943), (304, 0.5, 4.437)],
)
def test_higher_resolutions(pixels, rate, expected):
    model = build_model("deit_small_patch16_224", image_size=pixels, keep_rate=rate)
    assert macs(model) / 1e9 == pytest.approx(expected, abs=5e-3)


def test_the_distilled_model_pays_for_its_token_and_head():
    plain = macs(build_model("deit_tiny_patch16_224"))
    distilled = macs(build_model("deit_tiny_distilled_patch16_224"))
    token = 12 * (12 * 192**2 + 2 * 192 * (198**2 - 197**2))
    assert distilled - plain == token + 192 * 1000


def test_logits_alone_need_only_the_prefix_of_the_last_block():
    model = build_model("deit_small_patch16_224")
    width, hidden = 384, 1536
    unread = 196 * (width**2 + 2 * 197 * width + 2 * width * hidden)
    assert macs(model) - logit_macs(model) == unread
    reduced = build_model("deit_small_distilled_patch16_224", keep_rate=0.5)
    entering = reduced.tokens_per_block[-2]
    unread = (entering - 2) * (width**2 + 2 * entering * width + 2 * width * hidden)
    assert macs(reduced) - logit_macs(reduced) == unread
    assert logit_macs(build_model("vit", depth=1)) < macs(build_model("vit", depth=1))


def test_logits_that_read_patches_leave_nothing_out():
    pooled = build_model("vit", class_token=False, pool="avg")
    assert logit_macs(pooled) == macs(pooled)
    mapped = build_model("vit", class_token=False, pool="map", reducer="tome", tokens=100)
    n, width = mapped.tokens_per_block[-1], 384
    keys_and_values, query_and_projection = 2 * n * width**2, 2 * width**2
    attention, mlp = 2 * n * width, 2 * width * 1536
    pooling = keys_and_values + query_and_projection + attention + mlp
    assert mapped.head_macs == pooling + 1000 * width


@pytest.mark.parametrize(("mlp", "ratio"), [("swiglu", 2.0), ("swiglu_packed", 4.0)])
def test_a_gated_mlp_has_three_products(mlp, ratio):
    gated = build_model("vit", mlp=mlp, mlp_ratio=ratio, activation="silu")
    plain = build_model("vit", mlp_ratio=2.0)
    assert gated.hidden == plain.hidden == 768
    assert macs(gated) - macs(plain) == 12 * 197 * 384 * 768


def test_a_ramp_leaves_patches_where_logits_read_them():
    budget = 0.6 * macs(build_model("vit"))
    token = build_model("vit", reducer="ward", macs=budget)
    pooled = build_model("vit", reducer="ward:by=mean", macs=budget, class_token=False, pool="avg")
    assert token.keep[-1] == 1
    assert pooled.keep[-1] > 10
