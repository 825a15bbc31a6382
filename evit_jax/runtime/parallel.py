# SPDX-License-Identifier: Apache-2.0
"""The only file that knows about devices and processes.

`DataParallel` is jit over a mesh: batches are split over its one axis, the state is the same on
every device or, on request, sharded over the same axis, and XLA puts in the sums and gathers that
this asks for; a step is an ordinary function of the whole batch. `PmapParallel` is the second mode
behind the same interface: every device runs the step on its own part of the batch.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from evit_jax.errors import InputError, check_name
from evit_jax.runtime.topologies import absent_devices

AXIS = "data"
CPU_CACHE = 10_000_000  # bytes of activations that a CPU works on fast; found by trying


class DataParallel:
    """Places batches and states on a mesh and compiles steps for it."""

    def __init__(
        self,
        devices: Sequence[jax.Device] | None = None,
        *,
        shard_params: bool = False,
        compiler_options: dict[str, object] | None = None,
    ):
        """Uses all devices of all processes unless told which.

        `shard_params` keeps only a part of every large array of the state on each device (fully
        sharded data parallelism): for models that do not fit otherwise, at the cost of gathering
        them for every use. `compiler_options` are XLA's, by name.
        """
        # In the order of processes, whatever the topology: so a host's rows of a batch are
        # contiguous, and an image's place, on which its draws depend, is the same on any number.
        devices = sorted(devices or jax.devices(), key=lambda d: (d.process_index, d.id))
        devices = np.asarray(devices)
        self.mesh = Mesh(devices, (AXIS,), axis_types=(AxisType.Auto,))
        self.replicated = NamedSharding(self.mesh, PartitionSpec())
        self.split = NamedSharding(self.mesh, PartitionSpec(AXIS))
        self.shard_params = shard_params
        self.compiler_options = compiler_options

    @property
    def platform(self) -> str:
        """Of its devices, "cpu", "gpu" or "tpu": what a program compiled here is for."""
        return self.mesh.devices.flat[0].platform

    def check_batch_size(
        self, name: str, batch_size: int, *, accumulate: int = 1, pairs: bool = False
    ) -> None:
        """Raises InputError unless every device gets the same number of images.

        With gradient accumulation also in each micro-batch, and whole pairs where images are mixed.
        """
        devices, unit = self.mesh.size, self.mesh.size * accumulate * (1 + pairs)
        if batch_size < 1 or batch_size % unit:
            near = max(round(batch_size / unit), 1) * unit
            parts = f"{devices} device(s)"
            if accumulate > 1:
                parts += f" x {accumulate} micro-batches"
            if pairs:
                parts += " x 2, as images are mixed in pairs"
            what = f"the {parts}" if unit == devices else f"{unit} ({parts})"
            raise InputError(
                f"{name} must be a positive multiple of {what}, got {batch_size}; try {near}"
            )

    def sharding(self, shape: tuple[int, ...]) -> NamedSharding:
        """Where an array of the state lives: everywhere, or split along its longest axis."""
        devices = self.mesh.size
        axes = [i for i, side in enumerate(shape) if side % devices == 0]
        if not self.shard_params or not axes or np.prod(shape) < 1024 * devices:
            return self.replicated
        longest = max(axes, key=lambda i: shape[i])
        return NamedSharding(self.mesh, PartitionSpec(*(None,) * longest, AXIS))

    def shardings(self, tree):
        """`sharding` of every array, or shape, of a tree."""
        return jax.tree.map(lambda leaf: self.sharding(leaf.shape), tree)

    def placed(self, shapes):
        """Shapes of a state -> the same with where each array lives, for restoring it."""
        return jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=self.sharding(a.shape)),
            shapes,
        )

    def gather(self, params):
        """Arrays that are placed like the state -> the same, whole on every device.

        Their gradients are placed like the state. XLA decides where this is done, block by block.
        Left without it, it may keep the parts of the weights where they are and move activations
        instead: those of the last block's class tokens, and the logits.
        """
        return jax.tree.map(lambda a: gathered(a, self.replicated, self.sharding(a.shape)), params)

    def init(self, function: Callable, *args):
        """Runs `function`, with its result where the state lives."""
        shardings = self.shardings(jax.eval_shape(function, *args))
        return jax.jit(function, out_shardings=shardings)(*args)

    def put(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """This process's part of a batch -> the global batch, split over devices."""
        return jax.tree.map(
            lambda array: jax.make_array_from_process_local_data(self.split, array), batch
        )

    def compile_train(self, step: Callable, state: dict, batch: dict, frozen: dict) -> Callable:
        """Compiles (state, batch, frozen) -> (state, figures); the state passed in is donated.

        Args:
          step: a function like `steps.train_step`; where the state is sharded it is told how to
            `gather` parameters.
          state, batch, frozen: arrays, or the global shapes and dtypes of arrays.

        Raises:
          InputError: the compiler found that it does not fit into a device's memory.
        """
        states = self.shardings(state)
        if self.shard_params:
            step = functools.partial(step, gather=self.gather)
        lowered = jax.jit(
            step,
            in_shardings=(states, self.split, self.shardings(frozen)),
            out_shardings=(states, self.replicated),
            donate_argnums=0,
            compiler_options=self.compiler_options,
        ).lower(*shapes_of((state, batch, frozen)))
        try:
            return self.one_at_a_time(lowered.compile())
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise InputError(
                "the training step does not fit into a device's memory; lower batch_size, or set "
                "run.accumulate, model.remat or run.shard_params. The compiler: "
                + str(error).splitlines()[0]
            ) from error

    def compile_eval(self, step: Callable) -> Callable:
        """(params, batch) -> result on every device."""

        def with_whole_params(params, batch):
            return step(self.gather(params), batch)

        program = with_whole_params if self.shard_params else step
        return self.one_at_a_time(
            jax.jit(program, out_shardings=self.replicated, compiler_options=self.compiler_options)
        )

    def one_at_a_time(self, program: Callable) -> Callable:
        """The program itself, but on virtual CPU devices with its result awaited.

        Two programs in flight there can each hold the threads that the other's sums over devices
        wait for; XLA then aborts the process after a minute.
        """
        if self.mesh.size == 1 or self.platform != "cpu":
            return program
        return with_result(program, jax.block_until_ready)


class PmapParallel(DataParallel):
    """The same by pmap: batches get a leading axis of devices, steps the name of an axis."""

    def put(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """This process's part of a batch -> (its devices, images of each, ...)."""
        return jax.tree.map(lambda a: a.reshape(jax.local_device_count(), -1, *a.shape[1:]), batch)

    def compile_train(self, step: Callable, state: dict, batch: dict, frozen: dict) -> Callable:
        program = self.pmap(step, in_axes=(None, 0, None), out_axes=(None, None), donate_argnums=0)
        if jax.process_count() > 1:  # pmap cannot compile ahead there, it does at the first call
            return self.everywhere(program)

        def part(a):  # of the global batch
            each = a.shape[0] // self.mesh.size
            return jax.ShapeDtypeStruct((self.mesh.size, each, *a.shape[1:]), a.dtype)

        state, batch, frozen = shapes_of((state, batch, frozen))
        return self.everywhere(program.lower(state, jax.tree.map(part, batch), frozen).compile())

    def compile_eval(self, step: Callable) -> Callable:
        return self.everywhere(self.pmap(step, in_axes=(None, 0), out_axes=None))

    def pmap(self, step: Callable, **options) -> Callable:
        step = functools.partial(step, axis=AXIS)
        return jax.pmap(step, AXIS, devices=list(self.mesh.devices.flat), **options)

    def everywhere(self, program: Callable) -> Callable:
        """Its results as global arrays.

        Across processes pmap leaves arrays that belong to one process, which cannot be saved.
        """

        def globally(array):
            shards = [shard.data for shard in array.addressable_shards]
            return jax.make_array_from_single_device_arrays(array.shape, self.replicated, shards)

        if jax.process_count() > 1:
            program = with_result(program, functools.partial(jax.tree.map, globally))
        return self.one_at_a_time(program)


def chunk_size(model, batch_size: int, *, train: bool = False, platform: str | None = None) -> int:
    """How many images to work on at a time.

    All of them, but on a single CPU device a divisor of the batch size whose widest activations
    stay in the caches (docs/performance.md). Training needs twice the room, and pairs for mixup.

    Args:
      model: with `prefix`, `patches` and `hidden`.
      platform: of the device that the program is for; default this process's.
    """
    if (platform or jax.default_backend()) != "cpu" or jax.device_count() != 1:
        return batch_size
    unit = 1 + train
    most = max(unit, CPU_CACHE // (4 * (model.prefix + model.patches) * model.hidden * unit))
    fitting = (n for n in range(min(most, batch_size), most // 2, -1) if not n % unit)
    return next((n for n in fitting if batch_size % n == 0), batch_size)


@dataclasses.dataclass(frozen=True)
class Chunked:
    """A model for inference that takes a batch in chunks of `chunk_size`, one after the other.

    On anything but a single CPU device that is the whole batch, and nothing changes. It is for
    programs that run here, or on `platform`; a model that leaves, by export, has no chunks.
    """

    model: object
    platform: str | None = None  # as for `chunk_size`

    def apply(self, variables: dict, images: jax.Array):
        """As `model.apply`, whose results have a leading axis of images."""
        size = chunk_size(self.model, images.shape[0], platform=self.platform)
        if size == images.shape[0]:
            return self.model.apply(variables, images)
        chunks = images.reshape(-1, size, *images.shape[1:])
        result = jax.lax.map(lambda chunk: self.model.apply(variables, chunk), chunks)
        return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), result)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def gathered(array: jax.Array, whole: NamedSharding, parts: NamedSharding) -> jax.Array:
    """The array placed as `whole` says, and its gradient as `parts` says."""
    del parts
    return jax.lax.with_sharding_constraint(array, whole)


gathered.defvjp(
    lambda array, whole, parts: (gathered(array, whole, parts), None),
    # Asked for in parts, the sum over devices may become a reduce-scatter.
    lambda whole, parts, _, gradient: (jax.lax.with_sharding_constraint(gradient, parts),),
)


def shapes_of(tree):
    """Arrays -> their shapes and dtypes."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def with_result(program: Callable, function: Callable) -> Callable:
    """The program, followed by a function of its result."""

    def followed(*args):
        return function(program(*args))

    followed.memory_analysis = getattr(program, "memory_analysis", lambda: None)  # XLA's account
    followed.as_text = getattr(program, "as_text", lambda: "")
    return followed


def portable(function: Callable) -> Callable:
    """A function as jit takes it, bound to no device, for `jax.export`."""
    return jax.jit(function)


MODES = {"jit": DataParallel, "pmap": PmapParallel}


def choose(mode: str, *, shard_params: bool = False, chips: str = "") -> DataParallel:
    """The mode by its name, over all devices of all processes, or chips that are not there.

    Args:
      mode: one of `MODES`.
      shard_params: as for `DataParallel`.
      chips: as for `topologies.absent_devices`; then steps can be compiled, and nothing can run.
    """
    check_name("parallel mode", mode, MODES)
    if mode == "pmap" and shard_params:
        raise InputError("pmap keeps all parameters on every device; shard_params needs jit")
    if mode == "pmap" and chips:
        raise InputError("pmap runs on this machine's devices alone; chips need run.parallel=jit")
    if mode == "pmap":
        return PmapParallel()
    return DataParallel(absent_devices(chips) if chips else None, shard_params=shard_params)
