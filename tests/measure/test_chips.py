# SPDX-License-Identifier: Apache-2.0
"""Estimates for chips that are not there; with their compilers where those are installed."""

import jax
import jax.numpy as jnp
import pytest

from evit_jax.errors import InputError
from evit_jax.measure import chips
from evit_jax.measure.chips import Estimate, Target, temporaries_by_message
from evit_jax.models import build_model, preprocessing
from evit_jax.runtime.parallel import DataParallel
from tests.support.compilers import needs_tpu_compiler

SIZES = dict(image_size=32, patch_size=8, width=64, depth=2, num_heads=2, num_classes=5)
TOO_MUCH = (
    "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory "
    "required for HLO temporaries (91.75G) exceeds available HBM (15.75G). HLO module: jit_logits."
)


def estimate(unit="cycles", cost=100, **changes):
    figures = dict(
        unit=unit, cost=cost, operations=dict(a=60, b=30, c=10), kernels=2, unestimated=3, loops=0,
        argument_bytes=1, temporary_bytes=2, needed_bytes=4, fits=True,
    )  # fmt: skip
    return Estimate(**figures | changes)


def test_figures_name_what_they_count():
    dense = estimate(cost=150)
    figures = estimate().figures(dense, operations=2)
    assert (figures["cycles"], figures["speedup"], figures["pallas_kernels"]) == (100, 1.5, 2)
    assert figures["unestimated"] == 3
    assert figures["operations"] == [dict(name="a", cycles=60), dict(name="b", cycles=30)]
    assert figures["source"] == "estimated by the compiler"
    figures = estimate("bytes").figures(estimate("bytes", 80))
    assert (figures["bytes"], figures["speedup"], figures["kernels"]) == (100, 0.8, 2)
    assert not {"cycles", "pallas_kernels", "unestimated", "operations"} & figures.keys()


def here(memory_bytes):
    """A target that compiles for this machine's CPU and counts bytes."""
    target = object.__new__(Target)
    target.name, target.chip = "cpu", chips.chip_of("h200")._replace(memory_bytes=memory_bytes)
    target.devices = DataParallel(jax.devices()[:1])
    return target


def test_a_program_fits_where_arguments_results_and_temporaries_do():
    model = build_model("vit", **SIZES)
    params = sum(leaf.size for leaf in jax.tree.leaves(chips.param_shapes(model)))
    images, logits = 2 * 32 * 32 * 3, 2 * 5
    found = here(2**30).logits(model, 2)
    assert found.argument_bytes == 4 * (params + images)
    assert found.needed_bytes == found.argument_bytes + found.temporary_bytes + 4 * logits
    assert found.fits
    assert here(found.needed_bytes).logits(model, 2).fits
    assert not here(found.needed_bytes - 1).logits(model, 2).fits


def test_a_program_that_the_compiler_refuses_does_not_fit():
    def refuse(error):
        def compile_one(devices):
            raise jax.errors.JaxRuntimeError(error)

        return here(1).estimate(compile_one)

    found = refuse(TOO_MUCH)
    assert (found.fits, found.cost, found.temporary_bytes) == (False, None, round(91.75 * 2**30))
    figures = found.figures(estimate("bytes"), operations=3)
    assert (figures["bytes"], figures["speedup"], figures["operations"]) == (None, None, [])
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        refuse("INTERNAL: something else")


def test_memory_is_read_from_the_message_where_it_is_there():
    assert temporaries_by_message("temporaries (512.5M) exceeds") == 512.5 * 2**20
    assert temporaries_by_message("RESOURCE_EXHAUSTED: out of memory") is None


def test_costs_are_of_one_chip():
    with pytest.raises(InputError, match="costs are of one chip; ask for v5e"):
        Target("v5e:4x4")


def by_platform(x):
    return jax.lax.platform_dependent(x, tpu=lambda x: x @ x, cuda=jnp.tanh, default=jnp.sin)


@needs_tpu_compiler
@pytest.mark.parametrize("name", ["v5e", "v6e", "v5p"])
def test_a_tpus_program_is_its_own_and_has_cycles(name):
    target = Target(name)
    square = jax.ShapeDtypeStruct((512, 512), jnp.float32)
    found = target.estimate(
        lambda devices: devices.compile_eval(by_platform).lower(square).compile()
    )
    assert sum("dot_general" in name for name in found.operations) == 1
    assert 1000 < found.cost < 1e6
    assert found.argument_bytes == 4 * 512**2


@needs_tpu_compiler
def test_a_larger_batch_and_training_cost_a_tpu_more_and_a_block_a_part():
    target, model = Target("v5e"), build_model("vit", **SIZES | dict(depth=1), dtype="bfloat16")
    small, large = (target.logits(model, batch) for batch in (2, 32))
    assert small.cost < large.cost
    assert (small.loops, large.loops) == (0, 0)  # the batch is whole
    assert target.compiler.startswith("libtpu 0.")
    assert 0.2 * large.cost < target.block_cost(model, 17, 32) < 2 * large.cost
    step = target.training_step(model, 32, preprocessing("vit"))
    assert step.cost > 2 * large.cost
    assert any(name.startswith("transpose(jvp(ViT))/blocks/") for name in step.operations)


@needs_tpu_compiler
def test_what_does_not_fit_into_a_tpu_is_said_with_its_memory():
    model = build_model("vit", **SIZES | dict(depth=1), dtype="bfloat16")
    found = Target("v5e").logits(model, 2**22)
    assert (found.fits, found.cost) == (False, None)
    assert found.temporary_bytes > 15.75 * 2**30
