# SPDX-License-Identifier: Apache-2.0
"""The measurements of tests/accelerator that JAX makes, in a process of their own."""

import functools
import gzip
import json
import shutil
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from evit_jax.measure import programs
from evit_jax.measure.training_steps import Training, synthetic_batch
from evit_jax.models import build_model, init_params, preprocessing
from evit_jax.plan.flops import logit_macs, macs
from evit_jax.training.trained import spec_of_name
from tests.accelerator.attention import COMPILERS, DEVICES, attention
from tests.accelerator.timing import kernels_of, take_turns, time_calls
from tests.accelerator.workers import answer, brief

MEMORY_SHARE = 0.95  # of the device's, which a program may ask for
prepared: dict[str, programs.Program] = {}


def describe() -> dict:
    """The device and the versions."""
    device = jax.devices()[0]
    stats = device.memory_stats() or {}
    return dict(
        device=device.device_kind,
        platform=device.platform,
        devices=jax.device_count(),
        memory_bytes=stats.get("bytes_limit"),
        versions={name: metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax")},
    )


def build(model: str, name: str, dtype: str = "bfloat16"):
    """ "dense", "evit 0.7" or "tome", which has the multiply-accumulates of EViT at 0.7."""
    spec = spec_of_name(model)
    family, _, rate = name.partition(" ")
    built = spec.build(keep_rate=float(rate or 1)) if family != "tome" else tome(spec)
    return built.clone(dtype=jnp.dtype(dtype))


def tome(spec):
    """ToMe whose blocks remove r or, the first of them, r + 1 tokens, nearest to EViT at 0.7."""
    wanted, depth = macs(spec.build(keep_rate=0.7)), spec.build().depth
    schedules = [
        (r + 1,) * more + (r,) * (depth - more)
        for r in range(spec.build().patches // depth)
        for more in range(depth)
    ]
    built = [build_model(**spec.settings, reducer=dict(name="tome", r=r)) for r in schedules]
    return min(built, key=lambda model: abs(macs(model) - wanted))


@functools.cache
def params_of(model: str) -> dict:
    """Random weights, float32, on the device."""
    return DEVICES.init(functools.partial(init_params, build(model, "dense")), jax.random.key(0))


def peak(sides: list[int], copied: int, rounds: int, seconds: float) -> dict:
    """The fastest matrix product in bfloat16 and the fastest copy that there is.

    Args:
      sides: of square matrices, random: a product of zeros takes less power and runs faster.
      copied: bytes of the array that x + 1 reads, and writes as many.
    """
    multiply, add = DEVICES.compile_eval(jnp.matmul), DEVICES.compile_eval(lambda x, y: x + y)

    def normal(shape):
        draw = functools.partial(jax.random.normal, shape=shape, dtype=jnp.bfloat16)
        return DEVICES.init(draw, jax.random.key(0))

    calls, work = {}, {}
    for side in sides:
        calls[str(side)] = functools.partial(multiply, normal((side, side)), normal((side, side)))
        work[str(side)] = 2 * side**3
    calls["copy"] = functools.partial(add, normal((copied // 2,)), jnp.bfloat16(1))
    work["copy"] = 2 * copied
    times = take_turns(calls, rounds=rounds, seconds=seconds)
    rates = {name: work[name] / float(np.median(spent)) for name, spent in times.items()}
    bandwidth = rates.pop("copy")
    return dict(flops_per_second=max(rates.values()), bytes_per_second=bandwidth, by_side=rates)


def prepare(model: str, mode: str, batch_size: int, names: list[str], limit: float) -> dict:
    """Compiles variants for `turn`; name -> its figures, or dict(error=TEXT).

    Args:
      limit: seconds; what is not compiled by then is left out.
    """
    end = time.monotonic() + limit
    prepared.clear()
    built = {name: build(model, name) for name in names}
    dense = build(model, "dense")
    card = preprocessing(spec_of_name(model).name)
    batch = synthetic_batch(dense.image_size, batch_size, dense.num_classes, DEVICES)
    training = None
    if mode == "training":
        training = Training(params_of(model), card, batch, DEVICES)
        compile_one = training.program
    else:
        params = programs.cast(params_of(model), dense.dtype, DEVICES)
        images = DEVICES.init(card.normalize, batch["image"])
        fixed = dict(params=params, images=images, devices=DEVICES)
        compile_one = functools.partial(programs.inference, **fixed)
    memory = (jax.devices()[0].memory_stats() or {}).get("bytes_limit", float("inf"))
    figures = {}
    pool = ThreadPoolExecutor(COMPILERS)
    futures = {name: pool.submit(compile_one, one) for name, one in built.items()}
    for name, future in futures.items():
        try:
            program = future.result(timeout=max(end - time.monotonic(), 0))
            needed = program.peak_memory_bytes
            if (needed or 0) > MEMORY_SHARE * memory:
                raise MemoryError(f"it needs {needed / 2**30:.0f} GiB, too much")
            time_calls(name, program.call)
            prepared[name] = program
            figures[name] = dict(
                macs=macs(built[name]),
                flops=2 * logit_macs(built[name]),
                tokens=built[name].tokens_per_block,
                memory_bytes=needed,
            )
        except TimeoutError:
            figures[name] = dict(error=f"not compiled within {limit:.0f} s")
        except Exception as error:
            figures[name] = dict(error=brief(error))
            if training:  # a step that fails takes the state along, which the others need
                training.__post_init__(params_of(model))
    pool.shutdown(wait=False, cancel_futures=True)
    return figures


def turn(name: str, calls: int, queued: bool) -> float:
    """Seconds a call."""
    return time_calls(name, prepared[name].call, calls, queued=queued)


def correctness(model: str, names: list[str], batch_size: int, limit: float) -> list[dict]:
    """Logits in bfloat16 beside float32 on the device, and float32 beside the CPU's.

    Args:
      limit: seconds, after which no further variant is begun.
    """
    end = time.monotonic() + limit
    rng = np.random.default_rng(0)
    rows = []
    for name in names:
        if rows and time.monotonic() > end:
            break
        exact, half = (build(model, name, dtype) for dtype in ("float32", "bfloat16"))
        images = rng.normal(size=(batch_size, *exact.image_size, 3)).astype(np.float32)
        params = jax.device_get(params_of(model))

        def logits(one, device, params=params, images=images):
            def apply(params, images):
                return one.apply({"params": params}, images)[0]

            args = jax.device_put((params, images), device)
            with jax.default_matmul_precision("highest"):
                return np.asarray(jax.jit(apply)(*args), np.float64)

        device = jax.devices()[0]
        on_chip = logits(exact, device)
        pairs = dict(bfloat16_to_float32=(logits(half, device), on_chip))
        if device.platform != "cpu":
            pairs["float32_to_cpu"] = (on_chip, logits(exact, jax.devices("cpu")[0]))
        for compared, (got, expected) in pairs.items():
            rows.append(
                dict(
                    model=model,
                    variant=name,
                    compared=compared,
                    largest_difference=float(np.abs(got - expected).max()),
                    relative_difference=float(
                        np.linalg.norm(got - expected) / np.linalg.norm(expected)
                    ),
                    same_argmax=float(np.mean(got.argmax(-1) == expected.argmax(-1))),
                    finite=bool(np.isfinite(got).all()),
                )
            )
    return rows


def profile(
    model: str, mode: str, batch_size: int, names: list[str], keep: str, top: int, limit: float
) -> dict:
    """What the device did in three calls of a variant, longest kernels first.

    Args:
      keep: where a copy of the trace goes.
      top: how many kernels to name.
      limit: seconds for compiling.
    """
    found = prepare(model, mode, batch_size, names, limit)[names[0]]
    if "error" in found:
        raise RuntimeError(found["error"])
    call, calls = prepared[names[0]].call, 3
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            start = time.perf_counter()
            time_calls(names[0], call, calls)
            seconds = (time.perf_counter() - start) / calls
        path = max(Path(folder).rglob("*.trace.json.gz"), key=lambda path: path.stat().st_size)
        shutil.copy(path, keep)
    spent, count = kernels_of(json.loads(gzip.decompress(Path(keep).read_bytes())))
    busy = sum(spent.values())
    if not busy:
        raise RuntimeError(f"no kernels in the trace; it is kept as {Path(keep).name}")
    kernels = [
        dict(kernel=name, ms=ms / calls, calls=count[name] / calls, share=ms / busy)
        for name, ms in spent.most_common(top)
    ]
    return dict(
        model=model,
        variant=names[0],
        mode=mode,
        batch_size=batch_size,
        ms=1000 * seconds,
        busy_ms=busy / calls,
        kernels=kernels,
    )


def release() -> None:
    """Gives up what `prepare` made."""
    prepared.clear()


if __name__ == "__main__":
    operations = (describe, peak, prepare, turn, correctness, attention, profile, release)
    answer({operation.__name__: operation for operation in operations})
