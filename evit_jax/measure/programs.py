# SPDX-License-Identifier: Apache-2.0
"""Programs ready to be timed on one device, and what compiling them showed."""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from jax.experimental.compilation_cache import compilation_cache

from evit_jax.measure.timing import time_calls
from evit_jax.runtime.parallel import Chunked, DataParallel, chunk_size

PRODUCT_SECONDS = 0.01  # of the matrix product: starting it must not count
LARGEST_SIDE = 16384  # of its matrices, for their memory


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program with its arguments."""

    call: Callable[[], object]  # runs it once; returns what is ready when it is done
    compile_seconds: float  # tracing, lowering and compiling
    peak_memory_bytes: int | None  # arguments, results and temporaries; None: XLA does not say
    xla_flops: float | None  # of one call, by XLA's own count; None: it does not say


@contextlib.contextmanager
def without_program_cache() -> Iterator[None]:
    """Compiles every program inside afresh, whatever programs are kept on disk."""
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # JAX decides once whether there is one
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


def inference(model, params: dict, images: jax.Array, devices: DataParallel) -> Program:
    """The logits, and nothing else, of normalized images (B, H, W, 3) float32."""
    start = time.perf_counter()
    program = compile_logits(model, params, images, devices)
    seconds = time.perf_counter() - start
    loops = len(images) // chunk_size(model, len(images))
    figures = account(program, loops=loops)
    return Program(functools.partial(program, params, images), seconds, **figures)


def compile_logits(model, params: dict, images: jax.Array, devices: DataParallel):
    """The compiled program of `inference`; arrays, or shapes and dtypes of arrays."""

    def logits(params, images):
        return Chunked(model, devices.platform).apply({"params": params}, images)[0]

    return devices.compile_eval(logits).lower(params, images).compile()


def cast(params: dict, dtype: jnp.dtype, devices: DataParallel) -> dict:
    """The weights in the dtype of the computation, as a server would keep them."""
    return devices.init(lambda p: jax.tree.map(lambda leaf: leaf.astype(dtype), p), params)


def account(program, *, loops: int) -> dict[str, int | float | None]:
    """XLA's figures of a compiled program, as far as the backend has them.

    XLA counts what a loop does once; `loops` is how often it goes round, with nearly all the work.
    """
    memory = program.memory_analysis()
    peak = None
    if memory is not None:
        peak = memory.argument_size_in_bytes + memory.output_size_in_bytes
        peak += memory.temp_size_in_bytes - memory.alias_size_in_bytes
    flops = (program.cost_analysis() or {}).get("flops", 0)
    return dict(peak_memory_bytes=peak, xla_flops=loops * flops if flops > 0 else None)


def matrix_product(dtype: jnp.dtype, devices: DataParallel) -> tuple[Callable[[], object], int]:
    """A product of two square matrices at JAX's default precision, and its FLOPs.

    Its size is doubled until it keeps the device busy for a while. No data sheet says what a shared
    or throttled device can do; this does.
    """
    multiply, side = devices.compile_eval(jnp.matmul), 512
    while True:
        matrices = devices.init(
            lambda key, side=side: jax.random.normal(key, (2, side, side)).astype(dtype),
            jax.random.key(0),
        )
        product = functools.partial(multiply, *matrices)
        time_calls("matrix product", product)
        if time_calls("matrix product", product) >= PRODUCT_SECONDS or side >= LARGEST_SIDE:
            return product, 2 * side**3
        side *= 2
