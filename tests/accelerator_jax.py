# SPDX-License-Identifier: Apache-2.0
"""The measurements of tests/accelerator.py that JAX makes, in a process of their own."""

import functools
import gzip
import json
import re
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from evit_jax.measure import programs
from evit_jax.measure.timing import await_result
from evit_jax.measure.training_steps import Training, synthetic_batch
from evit_jax.models import build_model, init_params, preprocessing
from evit_jax.models.attention import attention_branch
from evit_jax.plan.flops import logit_macs, macs
from evit_jax.runtime.forms import EXACT, by_chip
from evit_jax.runtime.parallel import DataParallel
from evit_jax.training.trained import spec_of_name
from tests.accelerator_worker import answer, brief

COMPILERS = 4  # programs that are compiled at once
MEMORY_SHARE = 0.95  # of the device's, which a program may ask for
DEVICES = DataParallel(jax.devices()[:1])
prepared: dict[str, programs.Program] = {}


def time_calls(name: str, function: Callable, calls: int = 1, *, queued: bool = True) -> float:
    """Seconds a call.

    One device does what it is handed in order, so of queued calls the last is awaited. The results
    of the others are not kept: those of a turn might not fit into its memory.
    """
    start = time.perf_counter()
    for _ in range(calls):
        result = function()
        if not queued:
            await_result(name, result)
    await_result(name, result)
    return (time.perf_counter() - start) / calls


def take_turns(
    variants: dict[str, Callable], *, rounds: int, seconds: float
) -> dict[str, np.ndarray]:
    """Name -> (rounds,) seconds a call; every other round goes through them backwards."""
    calls = {}
    for name, function in variants.items():
        time_calls(name, function)
        calls[name] = max(1, round(seconds / time_calls(name, function)))
    figures = {name: [] for name in variants}
    for number in range(rounds):
        for name in reversed(variants) if number % 2 else variants:
            figures[name].append(time_calls(name, variants[name], calls[name]))
    return {name: np.asarray(values) for name, values in figures.items()}


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


def correctness(model: str, names: list[str], batch_size: int) -> list[dict]:
    """Logits in bfloat16 beside float32 on the device, and float32 beside the CPU's."""
    rng = np.random.default_rng(0)
    rows = []
    for name in names:
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


def fused_branch(x, kernels, biases, *, num_heads: int, implementation: str, tile: int = 1):
    """The attention branch around `jax.nn.dot_product_attention`; x (B, N, D) -> (B, N, D).

    Args:
      tile: pad the tokens to a multiple of this, hidden from the softmax.
    """
    batch, length, width = x.shape
    x = jnp.pad(x, ((0, 0), (0, -length % tile), (0, 0)))
    qkv = x @ kernels[0] + biases[0][None, None]
    q, k, v = jnp.moveaxis(qkv.reshape(*x.shape[:2], 3, num_heads, -1), 2, 0)
    visible = dict(key_value_seq_lengths=jnp.full((batch,), length, jnp.int32))
    y = jax.nn.dot_product_attention(
        q, k, v, implementation=implementation, **(visible if length % tile else {})
    )
    y = y[:, :length].reshape(batch, length, width)
    return y @ kernels[1] + biases[1][None, None]


def attention(
    lengths: list[int], num_heads: int, head_width: int, batch_size: int, **timing
) -> list[dict]:
    """The attention branch, projections included, in every form at the model's token counts."""
    width = num_heads * head_width

    def ours(x, kernels, biases):
        branch = functools.partial(attention_branch, num_heads=num_heads, first=None)
        return by_chip(branch, x, kernels, biases, None, dtype=x.dtype)[0]

    def exact(x, kernels, biases):
        fixed = dict(num_heads=num_heads, first=None, form=EXACT)
        return attention_branch(x, kernels, biases, None, **fixed)[0]

    fused = functools.partial(fused_branch, num_heads=num_heads)
    forms = {
        "the model's": ours,
        "the CPU's": exact,
        "XLA": functools.partial(fused, implementation="xla"),
        "cuDNN": functools.partial(fused, implementation="cudnn"),
        "cuDNN, tiles of 8": functools.partial(fused, implementation="cudnn", tile=8),
    }

    def gradient(form):
        return jax.grad(lambda *args: jnp.sum(form(*args).astype(jnp.float32) ** 2), (0, 1, 2))

    rows = []
    for length in lengths:
        shapes = ((batch_size, length, width), (width, 3 * width), (width, width))

        def draw(key, shapes=shapes):
            x, *kernels = (jax.random.normal(key, shape, jnp.bfloat16) for shape in shapes)
            biases = jnp.zeros(3 * width, jnp.bfloat16), jnp.zeros(width, jnp.bfloat16)
            return x, tuple(kernel * width**-0.5 for kernel in kernels), biases

        args = DEVICES.init(draw, jax.random.key(0))
        for mode, change in dict(inference=lambda form: form, gradient=gradient).items():
            calls, errors, expected = {}, {}, None
            for name, form in forms.items():
                try:
                    program = jax.jit(change(form)).lower(*args).compile()
                    calls[name] = functools.partial(program, *args)
                    got = np.asarray(jax.tree.leaves(calls[name]())[0], np.float32)
                    expected = got if expected is None else expected
                    off = np.linalg.norm(got - expected) / np.linalg.norm(expected)
                    errors[name] = dict(difference=float(off))
                except Exception as error:
                    calls.pop(name, None)
                    errors[name] = dict(error=brief(error))
            times = take_turns(calls, **timing)
            for name in forms:
                row = dict(num_heads=num_heads, tokens=length, mode=mode, form=name)
                row |= errors[name]
                if name in times:
                    row["ms"] = 1000 * float(np.median(times[name]))
                rows.append(row)
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


def kernels_of(trace: dict) -> tuple[Counter, Counter]:
    """(milliseconds, events) by name of kernel in a trace of `jax.profiler`.

    Of a GPU these are the events on its streams, of a TPU the XLA operations; a CPU's are those of
    any thread that name the instruction they run. Numbers that tell copies of a kernel apart
    (fusion.12, fusion_7) are dropped.
    """
    events = trace["traceEvents"]
    names = {
        (kind, event.get("pid"), event.get("tid") if kind == "thread_name" else None): (
            event.get("args", {}).get("name", "")
        )
        for event in events
        if event.get("ph") == "M" and (kind := event.get("name")) in ("process_name", "thread_name")
    }

    def place(event):
        pid, tid = event.get("pid"), event.get("tid")
        process = names.get(("process_name", pid, None), "")
        return process, names.get(("thread_name", pid, tid), "")

    done = [(event, *place(event)) for event in events if event.get("ph") == "X"]
    device = [(event, thread) for event, process, thread in done if "/device:" in process]
    for prefix in ("Stream", "XLA Ops"):
        if some := [event for event, thread in device if thread.startswith(prefix)]:
            break
    else:
        some = [event for event, *_ in done if "hlo_op" in event.get("args", {})]
    spent, count = Counter(), Counter()
    for event in some:
        name = re.sub(r"([._]\d+)+$", "", event["name"])
        spent[name] += event.get("dur", 0) / 1000  # microseconds
        count[name] += 1
    return spent, count


def release() -> None:
    """Gives up what `prepare` made."""
    prepared.clear()


if __name__ == "__main__":
    operations = (describe, peak, prepare, turn, correctness, attention, profile, release)
    answer({operation.__name__: operation for operation in operations})
