# SPDX-License-Identifier: Apache-2.0
"""What a dry run says of the compiled training step: memory, and what devices send each other."""

import jax

from evit_jax.runtime.collectives import Array, Collective, collectives
from evit_jax.runtime.parallel import DataParallel
from evit_jax.tables import table
from evit_jax.training.report import size_of

MIB = 2**20


def step_tables(
    state: dict, batch: dict, compiled, devices: DataParallel, *, memory: int | None = None
) -> str:
    """All tables of a step.

    Args:
      state, batch: arrays or their shapes, of all devices together.
      compiled: the step.
      devices: what it is compiled for.
      memory: of each device in bytes, where it is known.
    """
    tables = [memory_table(state, batch, compiled, devices, memory=memory)]
    if devices.mesh.size > 1:
        tables.append(collective_table(collectives(compiled.as_text()), state, batch, devices))
    return "\n\n".join(tables)


def memory_table(
    state: dict, batch: dict, compiled, devices: DataParallel, *, memory: int | None = None
) -> str:
    """What a step needs, on each device by XLA's own account; args as for `step_tables`."""
    rows = [[f"memory on {devices.mesh.size} {devices.platform} device(s)", "MiB"]]

    def row(name: str, size: float) -> None:
        rows.append([name, f"{size / MIB:,.1f}"])

    row("parameters", size_of(state["params"]))
    row("training state (with the parameters)", size_of(state))
    row("batch", size_of(batch))
    if (analysis := compiled.memory_analysis()) is not None:
        arguments, temporary = analysis.argument_size_in_bytes, analysis.temp_size_in_bytes
        row("on each device: its part of them", arguments)
        row("on each device: activations and temporaries", temporary)
        row("on each device: training step", arguments + temporary)
        if memory:
            fits = "fits into" if arguments + temporary <= memory else "DOES NOT FIT into"
            row(f"which {fits} its memory of", memory)
    return table(rows)


def collective_table(
    found: list[Collective], state: dict, batch: dict, devices: DataParallel
) -> str:
    """What devices send each other in a step; an array counts as a whole, and a loop as one turn.

    A TPU makes such loops of a product and the sum of its parts over devices: the sums travel
    around a ring, and each device adds its part.
    """
    operations: dict[tuple, set] = {}
    sizes: dict[tuple, list] = {}
    for number, collective in enumerate(found):
        for array in collective.arrays:
            what = purpose(collective, array, state["params"], batch, devices.mesh.size)
            kind = collective.kind + " (a turn of loops)" * collective.in_loop
            key = kind, what, array.dtype
            operations.setdefault(key, set()).add(number)
            sizes.setdefault(key, []).append(array.bytes)
    rows = [["between devices, in a step", "of", "dtype", "operations", "arrays", "MiB"]]
    for key in sorted(sizes, key=lambda key: -sum(sizes[key])):
        counts = f"{len(operations[key]):,}", f"{len(sizes[key]):,}"
        rows.append([*key, *counts, f"{sum(sizes[key]) / MIB:,.3f}"])
    arrays = sum(map(len, sizes.values()))
    total = sum(map(sum, sizes.values())) / MIB
    rows.append(["all", "", "", f"{len(found):,}", f"{arrays:,}", f"{total:,.3f}"])
    return table(rows)


def purpose(collective: Collective, array: Array, params: dict, batch: dict, devices: int) -> str:
    """What an array is: parameters, gradients, figures (numbers of a batch) or activations.

    It is told by name and shape. Activations and their gradients have an axis of images in front,
    of all or of those of a device; where a parameter's first axis is as long, that says nothing.
    What else is summed, or comes from the backward pass, is gradients of parameters. The rest is
    activations if it has a name; without one the compiler added it on its own, such as the last
    step of a reduce-scatter.
    """
    if collective.name.startswith(("state[", "frozen[")):
        return "parameters"  # small parts are gathered by a sum, each in its place among zeros
    if not array.shape:
        return "figures"
    images = batch["label"].shape[0]
    axes = {images, images // devices} - {leaf.shape[0] for leaf in jax.tree.leaves(params)}
    if array.shape[0] in axes:
        return "activations"
    if collective.kind in ("all-reduce", "reduce-scatter") or "/transpose(" in collective.name:
        return "gradients"
    return "activations" if collective.name else "unnamed"
