# SPDX-License-Identifier: Apache-2.0
"""The only file that knows about devices: data parallelism by jit over a mesh.

Batches are split over the mesh's one axis, the state is the same on every device, and XLA puts in
the sums over devices that this asks for. A step is an ordinary function of the whole batch.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from evit_jax.errors import InputError


class DataParallel:
    """Places batches and states on a mesh and compiles steps for it."""

    def __init__(self, devices: Sequence[jax.Device] | None = None):
        """Uses all devices of all processes unless told which."""
        devices = np.asarray(jax.devices() if devices is None else devices)
        self.mesh = Mesh(devices, ("data",), axis_types=(AxisType.Auto,))
        self.replicated = NamedSharding(self.mesh, PartitionSpec())
        self.split = NamedSharding(self.mesh, PartitionSpec("data"))

    def check_batch_size(self, batch_size: int) -> None:
        """Raises InputError unless every device gets the same number of images."""
        devices = self.mesh.size
        if batch_size < 1 or batch_size % devices:
            near = max(round(batch_size / devices), 1) * devices
            raise InputError(
                f"batch_size must be a positive multiple of the {devices} device(s), "
                f"got {batch_size}; try {near}"
            )

    def init(self, function: Callable, *args):
        """Runs `function` with its result on every device."""
        return jax.jit(function, out_shardings=self.replicated)(*args)

    def put(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """This process's part of a batch -> the global batch, split over devices."""
        return jax.tree.map(
            lambda array: jax.make_array_from_process_local_data(self.split, array), batch
        )

    def compile_train(self, step: Callable) -> Callable:
        """(state, batch) -> (state, loss). The state passed in is given up."""
        return self.compile(step, donate_argnums=0)

    def compile_eval(self, step: Callable) -> Callable:
        """(params, batch) -> result on every device."""
        return self.compile(step)

    def compile(self, step: Callable, **options) -> Callable:
        """jit for (replicated, split over devices) -> replicated."""
        compiled = jax.jit(
            step,
            in_shardings=(self.replicated, self.split),
            out_shardings=self.replicated,
            **options,
        )
        if self.mesh.size == 1 or self.mesh.devices.flat[0].platform != "cpu":
            return compiled

        # Two programs in flight on virtual CPU devices can each hold the threads that the other's
        # sums over devices wait for; XLA then aborts the process after a minute.
        @functools.wraps(compiled)
        def one_at_a_time(*args):
            return jax.block_until_ready(compiled(*args))

        one_at_a_time.lower = compiled.lower
        return one_at_a_time
