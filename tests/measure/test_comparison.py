# SPDX-License-Identifier: Apache-2.0
"""What the benchmark sets side by side."""

import pytest

from evit_jax.errors import InputError
from evit_jax.measure import comparison
from evit_jax.plan.flops import macs
from evit_jax.training.trained import spec_of_name

SMALL = "vit:image_size=16,patch_size=4,width=16,depth=3,num_heads=2,num_classes=5"


def test_a_budget_is_for_all_reducers_alike():
    spec = spec_of_name(SMALL)
    full = macs(spec.build())
    dense, *others = comparison.variants_of(
        spec, reducers=["evit", "ward", "tome"], budget=0.8 * full
    )
    assert (dense.name, macs(dense.model)) == ("dense", full)
    assert [variant.name for variant in others] == ["evit", "ward", "tome"]
    assert all(0.5 * full < macs(variant.model) <= 0.8 * full for variant in others)
    with pytest.raises(InputError, match="no plan with these layers costs at most"):
        comparison.variants_of(spec, reducers=["evit"], budget=0.01 * full)
