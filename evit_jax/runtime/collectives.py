# SPDX-License-Identifier: Apache-2.0
"""What a compiled program sends between devices, read off its text."""

import math
import re
from typing import NamedTuple

BITS = dict(pred=8, s4=4, u4=4, s8=8, u8=8, s16=16, u16=16, bf16=16, f16=16, s32=32, u32=32, f32=32)
BITS |= dict(s64=64, u64=64, f64=64, f8e4m3fn=8, f8e5m2=8, c64=64)
KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|ragged-all-to-all|collective-permute"
KINDS += "|collective-broadcast|send|recv"
INSTRUCTION = re.compile(rf"\s+(?:ROOT )?%?(\S+) = (\(.*?\)|\S+) ({KINDS})(-start)?\((.*)")
LAYOUT = re.compile(r"\{[^{}]*\}|/\*index=\d+\*/")
ARRAY = re.compile(rf"\b({'|'.join(BITS)})\[([\d,]*)\]")


class Array(NamedTuple):
    """An array of a collective: all of it, where each device has or gets only a part."""

    dtype: str  # XLA's name, such as "bf16"
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return BITS[self.dtype] * math.prod(self.shape) // 8


class Collective(NamedTuple):
    """One operation between devices."""

    kind: str  # XLA's name, such as "all-reduce"
    arrays: tuple[Array, ...]
    name: str  # where it comes from: an operation's path, or an argument's such as state['params']
    in_loop: bool = False  # of how many turns, the text does not always say


def collectives(text: str) -> list[Collective]:
    """The collectives of a program.

    Args:
      text: of the compiled program, `compiled.as_text()`.
    """
    found, computation = {}, ""
    bodies = set(re.findall(r" while\(.*body=%?([^,\s]+)", text))
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith(" "):
            computation = line.removeprefix("%").split()[0]
        match = INSTRUCTION.match(line)
        if not match:
            continue
        name, result, kind, start, rest = match.groups()
        arrays = [
            Array(dtype, tuple(int(side) for side in sides.split(",") if side))
            for dtype, sides in ARRAY.findall(LAYOUT.sub("", result))
        ]
        if start and kind in ("all-gather", "collective-permute"):  # operands, results, and handles
            arrays = [array for array in arrays if array != Array("u32", ())]
            arrays = arrays[len(arrays) // 2 :]
        if kind == "reduce-scatter":
            axis = int(re.search(r"dimensions=\{(\d+)\}", rest)[1])
            arrays = [times(array, axis, group_size(rest)) for array in arrays]
        if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"  # what a TPU makes of a sum that is sliced
        source = re.search(r'op_name="([^"]*)"', rest)
        source = source[1].replace("\\'", "'") if source else ""
        # A TPU carries a collective on beside several products and the text repeats it in each of
        # those fusions, with the same channel. Elsewhere channels may be shared.
        channel = re.search(r"channel_id=(\d+)", rest) if "fus" in computation else None
        key = (kind, channel[1]) if channel else (computation, name)
        found.setdefault(key, Collective(kind, tuple(arrays), source, computation in bodies))
    return list(found.values())


def group_size(text: str) -> int:
    """How many devices take part in a collective, from the attributes of its instruction."""
    groups = text[text.index("replica_groups=") :]
    if mesh := re.match(r"replica_groups=mesh\[([^\]]*)\]", groups):  # mesh['data'=4]
        return math.prod(int(side) for side in re.findall(r"=(\d+)", mesh[1]))
    if listed := re.match(r"replica_groups=\{\{([\d,]+)\}", groups):  # {{0,1,2,3}}
        return len(listed[1].split(","))
    return int(re.match(r"replica_groups=\[\d+,(\d+)\]", groups)[1])  # [1,4]<=[4]


def times(array: Array, axis: int, size: int) -> Array:
    """The array with one of its axes so many times as long."""
    shape = (*array.shape[:axis], array.shape[axis] * size, *array.shape[axis + 1 :])
    return Array(array.dtype, shape)
