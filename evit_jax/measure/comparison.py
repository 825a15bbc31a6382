# SPDX-License-Identifier: Apache-2.0
"""What the benchmark compares: variants of models that take turns, and the figures of each."""

import dataclasses
import functools
import itertools
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from evit_jax.errors import InputError
from evit_jax.measure.programs import (
    Program,
    cast,
    inference,
    matrix_product,
    without_program_cache,
)
from evit_jax.measure.report import spread, variation
from evit_jax.measure.timing import take_turns
from evit_jax.measure.training_steps import Training, synthetic_batch
from evit_jax.models import init_params, preprocessing
from evit_jax.plan.counts import check_rate
from evit_jax.plan.flops import logit_macs, macs
from evit_jax.runtime.parallel import DataParallel
from evit_jax.training.trained import ModelSpec, reduces

PASSES = dict(inference=1, training=3)  # forward passes' worth of arithmetic in a call
PRODUCT = "matrix product"


@dataclasses.dataclass(frozen=True)
class Variant:
    """A model with a token plan."""

    reducer: str  # as the user wrote it; "dense" for the one that the others are compared to
    keep_rate: float | None  # None where the reducer's own schedule holds
    model: object  # Linen module

    @property
    def name(self) -> str:
        rate = "" if self.reducer == "dense" or self.keep_rate is None else f" {self.keep_rate:g}"
        return self.reducer + rate


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Variants of one model that take turns; the dense one is the first."""

    spec: ModelSpec
    mode: str
    batch_size: int
    variants: list[Variant]  # of the same dtype

    @property
    def dense(self):
        return self.variants[0].model


def variants_of(
    spec: ModelSpec,
    *,
    reducers: list[str] = (),
    keep_rates: tuple[float, ...] = (),
    budget: float | None = None,
) -> list[Variant]:
    """A model's variants, the dense one first.

    Args:
      spec: a named model, one of sizes, or a training run's.
      reducers: such as "evit:fuse=False"; one with a schedule of its own, such as "tome:r=13", is
        a single variant. Default the model's own.
      keep_rates: for the others; default that of the run, else 0.7.
      budget: instead of them, multiply-accumulates of one image, for all reducers alike.

    Raises:
      InputError: an unknown name, a setting out of range, or rates that nobody takes.
    """
    rates = [check_rate(rate) for rate in dict.fromkeys(keep_rates)]
    variants = [Variant("dense", 1.0, spec.build(keep_rate=1))]
    if budget is not None:
        for reducer in reducers or [spec.reducer]:
            model = spec.with_reducer(reducer).build(macs=budget)
            variants.append(Variant(reducer, None, model))
        return variants
    rated = False
    for reducer in reducers or [spec.reducer]:
        own = spec.with_reducer(reducer)
        model = own.build()
        if own.keep_rate is None and reduces(model) and not (rates and own.counted):
            variants.append(Variant(reducer, None, model))
            continue
        rated = True
        for rate in rates or [own.keep_rate or 0.7]:
            if rate != 1:
                variants.append(Variant(reducer, rate, own.build(keep_rate=rate)))
    if not rated and set(rates) - {1}:
        raise InputError(
            "--keep_rates are for reducers without a schedule of their own; "
            f"{', '.join(reducers or [spec.reducer])} takes none; leave them out, or add evit to "
            "--reducers"
        )
    return variants


def comparisons_of(
    specs: list[ModelSpec],
    *,
    dtypes: list[np.dtype],
    modes: list[str],
    batch_sizes: tuple[int, ...],
    reducers: list[str],
    keep_rates: tuple[float, ...],
    budget: float | None = None,
) -> list[Comparison]:
    """All that is to be measured, model by model; `dtypes` [] is each model's own.

    The other arguments are those of `variants_of`.
    """
    comparisons = []
    for spec in specs:
        variants = variants_of(spec, reducers=reducers, keep_rates=keep_rates, budget=budget)
        own = [jnp.dtype(variants[0].model.dtype)]
        for dtype, mode, batch_size in itertools.product(dtypes or own, modes, batch_sizes):
            typed = [
                dataclasses.replace(variant, model=variant.model.clone(dtype=dtype))
                for variant in variants
            ]
            comparisons.append(Comparison(spec, mode, batch_size, typed))
    return comparisons


def compile_all(
    comparison: Comparison, params: dict, devices: DataParallel, progress: Callable[[str], object]
) -> dict[str, Program]:
    """The comparison's programs by their variants' names, over the same parameters (float32)."""
    model, card = comparison.dense, preprocessing(comparison.spec.name)
    batch = synthetic_batch(model.image_size, comparison.batch_size, model.num_classes, devices)
    if comparison.mode == "training":
        compile_one = Training(params, card, batch, devices).program
    else:
        params = cast(params, model.dtype, devices)
        images = devices.init(card.normalize, batch["image"])
        compile_one = functools.partial(inference, params=params, images=images, devices=devices)
    programs = {}
    for variant in comparison.variants:
        progress(f"compiling {variant.name}")
        programs[variant.name] = compile_one(variant.model)
    progress(f"{comparison.mode}, {model.dtype.name}, batch size {comparison.batch_size}")
    return programs


def describe(comparison: Comparison, variant: Variant) -> dict:
    """What a row says of a variant before anything is measured."""
    each = macs(variant.model)
    flops = 2 * PASSES[comparison.mode] * logit_macs(variant.model) * comparison.batch_size
    return dict(
        model=comparison.spec.label,
        keep_rate=variant.keep_rate,
        reducer=variant.reducer,
        batch_size=comparison.batch_size,
        dtype=variant.model.dtype.name,
        mode=comparison.mode,
        macs=each,
        macs_ratio=macs(comparison.dense) / each,
        flops=flops,
        tokens=variant.model.tokens_per_block,
    )


def rows_of(
    comparison: Comparison,
    programs: dict[str, Program],
    awaited: dict[str, np.ndarray],
    queued: dict[str, np.ndarray],
) -> list[dict]:
    """The variants' figures; `awaited` and `queued` are what `take_turns` found either way."""
    rows = []
    for variant in comparison.variants:
        program, seconds = programs[variant.name], queued[variant.name]
        middle = float(np.median(seconds))
        row = describe(comparison, variant)
        row |= dict(
            images_per_second=comparison.batch_size / middle,
            images_per_second_range=[
                comparison.batch_size / float(limit) for limit in (seconds.max(), seconds.min())
            ],
            **spread("latency_ms", 1000 * awaited[variant.name]),
            **spread("speedup", queued["dense"] / seconds),
            variation=variation(seconds),
            xla_flops=program.xla_flops,
            flops_per_second=row["flops"] / middle,
            compile_seconds=program.compile_seconds,
            peak_memory_bytes=program.peak_memory_bytes,
        )
        rows.append(row)
    return rows


def measure(
    comparisons: list[Comparison], *, rounds: int, seconds: float
) -> tuple[list[dict], dict[str, np.ndarray]]:
    """Makes all comparisons.

    Returns:
      (a row per variant, dtype -> FLOP/s of its matrix product (comparisons, rounds)).
    """
    devices = DataParallel(jax.devices()[:1])
    apart = jax.default_backend() != "cpu"  # on a CPU calls do not overlap
    turns = rounds * (1 + apart) * sum(len(comparison.variants) + 1 for comparison in comparisons)
    rows, peaks, products, params = [], {}, {}, {}
    with without_program_cache(), tqdm(total=turns, unit="turn", disable=None) as bar:
        take = functools.partial(take_turns, rounds=rounds, seconds=seconds, after_turn=bar.update)
        for comparison in comparisons:
            dtype = comparison.dense.dtype
            if dtype.name not in products:
                products[dtype.name] = matrix_product(dtype, devices)
            label = comparison.spec.label
            if label not in params:  # those of the model before are no longer needed
                trained = comparison.spec.run_params(comparison.dense)
                init = functools.partial(init_params, comparison.dense)
                params = {
                    label: devices.init(init, jax.random.key(0))  # speed does not depend on them
                    if trained is None
                    else devices.init(dict, trained)
                }
            product, flops = products[dtype.name]
            try:
                programs = compile_all(comparison, params[label], devices, bar.set_postfix_str)
                calls = {name: program.call for name, program in programs.items()}
                calls[PRODUCT] = product
                awaited = take(calls)
                queued = take(calls, queued=True) if apart else awaited
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                tqdm.write(
                    f"skipped: {label} with batch size {comparison.batch_size} in "
                    f"{comparison.mode} needs more memory than there is",
                    file=sys.stderr,
                )
                continue
            peaks.setdefault(dtype.name, []).append(flops / queued[PRODUCT])
            rows += rows_of(comparison, programs, awaited, queued)
    return rows, {name: np.asarray(values) for name, values in peaks.items()}
