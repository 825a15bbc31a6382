# SPDX-License-Identifier: Apache-2.0
"""What the benchmark's programs cost on chips that this machine does not have.

Programs are compiled for the chip and read, not run (`hlo` says what is counted). So the figures
are estimates by the compiler: the same on every machine, of use to compare programs on one chip,
and no times.
"""

import dataclasses
import functools
import re
from importlib import metadata

import jax
import jax.numpy as jnp

from evit_jax.errors import InputError
from evit_jax.measure.hlo import read_costs
from evit_jax.measure.programs import compile_logits
from evit_jax.measure.training_steps import benchmark_recipe, compile_step, first_state
from evit_jax.models import init_params
from evit_jax.models.card import Preprocessing
from evit_jax.runtime.parallel import DataParallel
from evit_jax.runtime.topologies import absent_devices, chip_of
from evit_jax.training import steps

# Matrix products by cuBLAS: XLA's own kernels for them are chosen by timing them on the GPU.
CUDA_OPTIONS = dict(xla_gpu_enable_triton_gemm=False)
IN_BLOCK = re.compile(r"\bblocks\b")  # labels of what `models.backbone` calls blocks_0 and so on
UNITS = dict(tpu="cycles", cuda="bytes")


@dataclasses.dataclass(frozen=True)
class Estimate:
    """One program on one chip, as its compiler expects it to be."""

    unit: str  # of cost: "cycles" or "bytes"
    cost: int | None  # of one call; None where the program does not fit and so was not compiled
    operations: dict[str, int]  # name -> its part of the cost, the largest first
    kernels: int | None  # on a TPU those of Pallas, which are not in the cost; on a GPU all
    unestimated: int | None  # sorts, gathers and scatters of a TPU, not in the cost either
    loops: int | None  # that count once in the cost, since it is not known how often they go round
    argument_bytes: int | None
    temporary_bytes: int | None
    needed_bytes: int | None  # arguments, results and temporaries; None where nobody says
    fits: bool  # into the chip's memory

    def speedup_over(self, dense: "Estimate") -> float | None:
        """The dense program's cost over this one's."""
        if self.cost is None or dense.cost is None:
            return None
        return dense.cost / self.cost

    def figures(self, dense: "Estimate", *, operations: int = 0) -> dict[str, object]:
        """For JSON, with so many of the most expensive operations."""
        figures = {
            "source": "estimated by the compiler",
            self.unit: self.cost,
            "speedup": self.speedup_over(dense),
        }
        if self.unit == "cycles":
            figures |= dict(pallas_kernels=self.kernels, unestimated=self.unestimated)
        else:
            figures |= dict(kernels=self.kernels)
        figures |= dict(
            loops=self.loops,
            argument_bytes=self.argument_bytes,
            temporary_bytes=self.temporary_bytes,
            needed_bytes=self.needed_bytes,
            fits=self.fits,
        )
        if operations:
            first = list(self.operations.items())[:operations]
            figures["operations"] = [{"name": name, self.unit: cost} for name, cost in first]
        return figures


class Target:
    """A chip to compile for."""

    def __init__(self, name: str):
        """Takes the chip's name, such as "v5e".

        Raises:
          InputError: an unknown chip, a slice of several, or its compiler is not installed.
        """
        self.name, self.chip = name, chip_of(name)
        if ":" in name:
            raise InputError(f"costs are of one chip; ask for {name.partition(':')[0]}")
        options = CUDA_OPTIONS if self.chip.platform == "cuda" else None
        self.devices = DataParallel(absent_devices(name)[:1], compiler_options=options)

    @property
    def unit(self) -> str:
        """Of its costs."""
        return UNITS[self.chip.platform]

    @property
    def compiler(self) -> str:
        """What compiles for it, with its version."""
        package = dict(tpu="libtpu", cuda="jaxlib")[self.chip.platform]
        try:
            return f"{package} {metadata.version(package)}"
        except metadata.PackageNotFoundError:  # a library named by TPU_LIBRARY_PATH
            return package

    def logits(self, model, batch_size: int) -> Estimate:
        """The benchmark's inference: logits, with weights in the model's dtype."""
        params, images = logit_shapes(model, batch_size)
        return self.estimate(functools.partial(compile_logits, model, params, images))

    def block_cost(self, model, tokens: int, batch_size: int) -> float:
        """Cost of one block that so many tokens enter, prefix included, and that all leave.

        The program is a model of one block on images of a single row of patches: of `patches` there
        can be any number there. Its stem is left out. Infinite where it does not fit.
        """
        high, wide = model.patch_size
        size = (high, wide * (tokens - model.prefix))
        block = model.clone(depth=1, keep=(), image_size=size)
        params, images = logit_shapes(block, batch_size)

        def compile_one(devices):
            def after(params, images):
                return block.apply({"params": params}, images)[1]["blocks"][-1]

            return devices.compile_eval(after).lower(params, images).compile()

        estimate = self.estimate(compile_one)
        if estimate.cost is None:
            return float("inf")
        return sum(cost for name, cost in estimate.operations.items() if IN_BLOCK.search(name))

    def training_step(self, model, batch_size: int, card: Preprocessing) -> Estimate:
        """The benchmark's training step: forward, backward, AdamW, weights in float32."""
        recipe = benchmark_recipe(card)
        state = jax.eval_shape(functools.partial(first_state, recipe), param_shapes(model))
        batch = steps.batch_shapes(model.image_size, batch_size)

        def compile_one(devices):
            return compile_step(model, recipe, state, batch, devices)[0]

        return self.estimate(compile_one)

    def estimate(self, compile_one) -> Estimate:
        """Compiles a function of `DataParallel` and reads what it returned."""
        try:
            program = compile_one(self.devices)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            nothing = dict.fromkeys(field.name for field in dataclasses.fields(Estimate))
            temporary = temporaries_by_message(str(error))
            known = dict(unit=self.unit, operations={}, temporary_bytes=temporary, fits=False)
            return Estimate(**nothing | known)
        costs = read_costs(program.as_text(), self.chip.platform)
        memory = program.memory_analysis()
        needed = memory.argument_size_in_bytes + memory.output_size_in_bytes
        needed += memory.temp_size_in_bytes - memory.alias_size_in_bytes
        return Estimate(
            unit=self.unit,
            cost=costs.total,
            operations=dict(costs.operations.most_common()),
            kernels=costs.kernels,
            unestimated=costs.unestimated,
            loops=costs.loops,
            argument_bytes=memory.argument_size_in_bytes,
            temporary_bytes=memory.temp_size_in_bytes,
            needed_bytes=needed,
            fits=needed <= self.chip.memory_bytes,
        )


def targets_of(names: list[str]) -> dict[str, Target]:
    """Name -> the chip; `topologies.absent_devices` says when to call it."""
    return {name: Target(name) for name in names}


def param_shapes(model) -> dict:
    """The shapes of a model's parameters, in float32."""
    return jax.eval_shape(functools.partial(init_params, model), jax.random.key(0))


def logit_shapes(model, batch_size: int) -> tuple[dict, jax.ShapeDtypeStruct]:
    """(parameters in the model's dtype, images)."""
    params = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, model.dtype), param_shapes(model)
    )
    return params, jax.ShapeDtypeStruct((batch_size, *model.image_size, 3), jnp.float32)


def temporaries_by_message(message: str) -> int | None:
    """The bytes that a TPU's compiler says a program's temporaries would need; None: it does not.

    "... the total memory required for HLO temporaries (91.79G) exceeds available HBM (15.75G). ..."
    """
    found = re.search(r"temporaries \(([\d.]+)([KMGT]?)\)", message)
    return found and round(float(found[1]) * 1024 ** " KMGT".index(found[2] or " "))
