# SPDX-License-Identifier: Apache-2.0
"""Times of calls on one device, and what a trace says of its kernels."""

import re
import time
from collections import Counter
from collections.abc import Callable

import numpy as np

from evit_jax.measure.timing import await_result


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
