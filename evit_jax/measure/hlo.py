# SPDX-License-Identifier: Apache-2.0
"""What a compiled program costs, read off its text as XLA prints it.

A TPU's compiler writes the cycles that it expects beside most operations (`estimated_cycles`). A
GPU's writes none; there the bytes that each kernel reads and writes are counted, as if no cache
held any of them from one kernel to the next.

Loops count as often as the program says that they go round. A TPU's does not say, so there the body
counts once, and `Costs.loops` how often that happened. Of branches the most expensive one counts.
"""

import collections
import dataclasses
import math
import re

HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
# A tuple's shape has no space that an operation's name and a parenthesis follow, so it ends at the
# first one.
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)")
OPERANDS = re.compile(r"[^()]*(?:\([^()]*\)[^()]*)*")  # up to the closing parenthesis
ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
# Neither work nor memory: names of what is there already.
FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id",
    "replica-id", "opt-barrier",
}  # fmt: skip
PLACES = {"AllocateBuffer", "ConcatBitcast"}  # custom calls of a TPU that only name memory
CALLS = re.compile(r"\b(?:to_apply|calls|body)=%?([\w.\-]+)")
BRANCHES = re.compile(r"\b(?:true_computation|false_computation)=%?([\w.\-]+)")
LISTED_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
TRIPS = re.compile(r'known_trip_count":?\s*\{"n":"(\d+)"')
CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
TARGET = re.compile(r'custom_call_target="([^"]+)"')


@dataclasses.dataclass
class Costs:
    """Of one call of a program, or of a part of it."""

    # Name -> cycles of a TPU or bytes of a GPU; those of equal name add up.
    operations: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    kernels: int = 0  # on a TPU those of Pallas, which have no estimate; on a GPU all
    unestimated: int = 0  # other operations of a TPU without one: sorts, gathers, scatters
    loops: int = 0  # counted once, as the program does not say how often they go round

    @property
    def total(self) -> int:
        return sum(self.operations.values())

    def add(self, other: "Costs", times: int = 1) -> None:
        for name, value in other.operations.items():
            self.operations[name] += times * value
        self.kernels += times * other.kernels
        self.unestimated += times * other.unestimated
        self.loops += times * other.loops


def read_costs(text: str, platform: str) -> Costs:
    """The costs of a compiled program.

    Args:
      text: of the program, `compiled.as_text()`.
      platform: "tpu" or "cuda".
    """
    computations, entry, name = {}, None, None
    for line in text.splitlines():
        if header := HEADER.match(line):
            name = header[2]
            computations[name] = []
            entry = name if header[1] else entry
        elif line.startswith("}"):
            name = None
        elif name and (found := INSTRUCTION.match(line)):
            computations[name].append((*found.groups(), line))
    if entry is None:
        raise ValueError("the text has no ENTRY computation; it is not that of a compiled program")
    cost_of = tpu_cost if platform == "tpu" else gpu_cost
    known: dict[str, Costs] = {}

    def costs(name: str) -> Costs:
        if name not in known:
            known[name] = total = Costs()
            shapes = {}
            for result, shape, operation, rest, line in computations.get(name, ()):
                shapes[result] = shape
                add_instruction(total, operation, shape, rest, line, shapes)
        return known[name]

    def add_instruction(total, operation, shape, rest, line, shapes) -> None:
        if operation in FREE:
            return
        if operation == "while":
            trips = TRIPS.search(line)
            total.loops += not trips
            for body in CALLS.findall(line):
                total.add(costs(body), int(trips[1]) if trips else 1)
        elif operation == "conditional":
            names = BRANCHES.findall(line)
            for group in LISTED_BRANCHES.findall(line):
                names += [branch.strip(" %") for branch in group.split(",")]
            total.add(max(map(costs, names), key=lambda branch: branch.total, default=Costs()))
        elif operation in ("call", "async-start"):
            for called in CALLS.findall(line):
                total.add(costs(called))
        elif not operation.endswith(("-start", "-done")):  # copies beside the computation
            operands = re.findall(r"%([\w.\-]+)", OPERANDS.match(rest)[0])
            read = [shapes.get(operand, "") for operand in dict.fromkeys(operands)]
            total.add(cost_of(operation, shape, read, line))

    return costs(entry)


def tpu_cost(operation: str, shape: str, read: list[str], line: str) -> Costs:
    """One operation's estimated cycles, or that it has none."""
    if cycles := CYCLES.search(line):
        return Costs(collections.Counter({label(line, operation): int(cycles[1])}))
    if operation == "custom-call":
        target = TARGET.search(line)
        target = target[1] if target else ""
        pallas = target == "tpu_custom_call"
        return Costs(kernels=int(pallas), unestimated=int(not pallas and target not in PLACES))
    # Numbers by themselves, such as a schedule's, and reshapes of one tile take next to nothing.
    return Costs(unestimated=int(operation in ("sort", "fusion", "gather", "scatter")))


def gpu_cost(operation: str, shape: str, read: list[str], line: str) -> Costs:
    """One kernel's bytes: what it reads, each array once, and what it writes."""
    written = ARRAY.findall(shape)
    target = TARGET.search(line)
    if target and target[1].startswith(("__cublas", "__cudnn")) and len(written) > 1:
        written = written[:-1]  # the last result is the library's workspace
    arrays = [*written, *(array for shape in read for array in ARRAY.findall(shape))]
    total = sum(map(array_bytes, arrays))
    return Costs(collections.Counter({label(line, operation): total}), kernels=1)


def array_bytes(array: tuple[str, str]) -> int:
    """("bf16", "8,17,64") -> 17408."""
    dtype, sides = array
    bits = re.search(r"\d+", dtype)
    bits = int(bits[0]) if bits else 8 if dtype == "pred" else 0  # a token has none
    return math.prod(int(side) for side in sides.split(",") if side) * bits // 8


def label(line: str, operation: str) -> str:
    """Where in the model an operation comes from, without block numbers, so that blocks add up.

    jit(logits)/ViT/blocks_3/attn/cond/branch_1_fun/dot_general -> ViT/blocks/attn/dot_general
    """
    found = re.search(r'op_name="([^"]+)"', line)
    if not found:
        return operation
    name = re.sub(r"jit\([^()]*\)/|cond/branch_\d+_fun/", "", found[1].replace("\\", ""))
    return re.sub(r"\b(blocks?)_\d+", r"\1", name)
