# SPDX-License-Identifier: Apache-2.0
"""The pickles inside PyTorch's weight files, read without torch and without running anything.

A pickle is a small program for a stack machine. Python's own machine calls what the file names and
allocates what it declares; even behind an allow-list it can be made to fill the memory (a memo
index of 2**31) or to crash (deeply nested dictionary keys). This machine knows only the operations
that torch.save writes, calls nothing, and takes every byte from the file: a tensor becomes a
description, and all else that a training checkpoint holds becomes an inert placeholder.
"""

import math
import struct
from dataclasses import dataclass, field

import ml_dtypes
import numpy as np

MAX_OPERATIONS = 2_000_000  # some seconds, and 100 bytes each; a large checkpoint has 10**5
MAX_DIMENSIONS = 32

DTYPES = {
    "torch.FloatStorage": np.dtype(np.float32),
    "torch.HalfStorage": np.dtype(np.float16),
    "torch.BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "torch.DoubleStorage": np.dtype(np.float64),
    "torch.LongStorage": np.dtype(np.int64),
    "torch.IntStorage": np.dtype(np.int32),
    "torch.ShortStorage": np.dtype(np.int16),
    "torch.CharStorage": np.dtype(np.int8),
    "torch.ByteStorage": np.dtype(np.uint8),
    "torch.BoolStorage": np.dtype(np.bool_),
}
PARAMETERS = {"torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"}
# What training checkpoints hold beside the weights. Each becomes a placeholder or an empty dict.
DICTS = {"collections.OrderedDict", "collections.defaultdict", "collections.Counter"}
INERT = {
    "argparse.Namespace",
    "types.SimpleNamespace",
    "datetime.datetime",
    "_codecs.encode",
    "torch.device",
    "numpy.dtype",
    "numpy.ndarray",
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core")
      for name in ("scalar", "_reconstruct")),
    *(f"pathlib{local}.{kind}{name}" for local in ("", "._local") for kind in ("", "Pure")
      for name in ("Path", "PosixPath", "WindowsPath")),
    *(f"{module}.{name}" for module in ("builtins", "__builtin__")
      for name in ("set", "frozenset", "dict", "list", "int", "float", "complex", "bytearray")),
    *(f"torch.{name}" for name in ("float32", "float16", "bfloat16", "float64", "bool", "uint8",
                                   "int8", "int16", "int32", "int64", "strided")),
}  # fmt: skip
KNOWN = {*DTYPES, *PARAMETERS, *DICTS, *INERT, "torch.Size", "torch._utils._rebuild_tensor_v2"}


class Refused(ValueError):
    """The file is damaged, hostile or of another kind; the text says which and what to do."""


class Placeholder:
    """Stands for any object that is no weight."""


PLACEHOLDER = Placeholder()


@dataclass(frozen=True)
class Global:
    """A class or function by its name, which is never looked up."""

    name: str


@dataclass(frozen=True)
class Storage:
    """The flat memory that tensors are views of; its bytes lie elsewhere in the file."""

    key: str
    dtype: np.dtype
    count: int


@dataclass(frozen=True)
class Tensor:
    """A view of a storage, checked to lie inside it; offset and strides count elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.storage.dtype.itemsize

    def read(self, content: bytes | memoryview) -> np.ndarray:
        """The values, as a view of the bytes of the storage, strided and aligned as these are."""
        if not self.nbytes:
            return np.zeros(self.shape, self.storage.dtype)
        flat = np.frombuffer(content, self.storage.dtype, self.storage.count)[self.offset :]
        steps = [stride * flat.itemsize for stride in self.strides]
        return np.lib.stride_tricks.as_strided(flat, self.shape, steps, writeable=False)


def is_size(value) -> bool:
    """Whether `value` can be a size, an offset or a stride (and is short enough to print)."""
    return type(value) is int and 0 <= value < 2**62


def make_tensor(storage, offset, shape, strides) -> Tensor:
    """What torch._utils._rebuild_tensor_v2 would build, or Refused."""
    numbers = isinstance(shape, tuple) and isinstance(strides, tuple)
    numbers = numbers and len(shape) == len(strides) <= MAX_DIMENSIONS
    numbers = numbers and all(is_size(number) for number in (offset, *shape, *strides))
    if not isinstance(storage, Storage) or not numbers:
        raise Refused("a tensor in it has no usable storage, offset, shape or strides")
    # Strides along sides of 1 mean nothing and can be anything.
    strides = tuple(step if side > 1 else 0 for side, step in zip(shape, strides, strict=True))
    last = offset + sum((side - 1) * step for side, step in zip(shape, strides, strict=True))
    if math.prod(max(side, 1) for side in shape) >= 2**56:
        raise Refused(f"a tensor in it has the impossible shape {shape}")
    if 0 not in shape and last >= storage.count:
        raise Refused(
            f"a tensor of shape {shape} reaches element {last} of a storage of {storage.count}"
        )
    return Tensor(storage, offset, shape, strides)


CONSTANTS = {b"N": None, b"\x88": True, b"\x89": False, b")": (), b"\x8f": PLACEHOLDER}
NUMBERS = {b"J": "<i", b"K": "<B", b"M": "<H", b"G": ">d"}
LONGS = {b"\x8a": "<B", b"\x8b": "<I"}
STRINGS = {b"X": "<I", b"\x8c": "<B", b"\x8d": "<Q", b"U": "<B", b"T": "<I"}
BYTES = {b"C": "<B", b"B": "<I", b"\x8e": "<Q", b"\x96": "<Q"}
TUPLES = {b"\x85": 1, b"\x86": 2, b"\x87": 3}
PUTS, GETS = {b"q": "<B", b"r": "<I"}, {b"h": "<B", b"j": "<I"}


@dataclass
class Machine:
    """Reads one pickle of `data` after another, from `position` on."""

    data: bytes
    position: int = 0
    storages: dict[str, Storage] = field(default_factory=dict)

    def load(self):
        """The next pickle's value; raises Refused."""
        self.stack, self.marks, self.memo = [], [], {}
        try:
            for _ in range(MAX_OPERATIONS):
                operation = self.take(1)
                if operation == b".":
                    return self.stack.pop()
                self.step(operation)
        except (IndexError, KeyError, UnicodeDecodeError) as error:
            raise Refused(f"it is damaged near byte {self.position}: get it again") from error
        raise Refused("its pickle is far too long for weights")

    def take(self, count: int) -> bytes:
        end = self.position + count
        if end > len(self.data):
            raise Refused("it is cut off or damaged: get it again")
        taken = self.data[self.position : end]
        self.position = end
        return taken

    def number(self, code: str):
        return struct.unpack(code, self.take(struct.calcsize(code)))[0]

    def since_mark(self) -> list:
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def step(self, operation: bytes) -> None:
        """Carries out one operation; the names in the comments are those of pickletools."""
        stack = self.stack
        if operation in PUTS:  # BINPUT, LONG_BINPUT
            self.memo[self.number(PUTS[operation])] = stack[-1]
        elif operation == b"\x94":  # MEMOIZE
            self.memo[len(self.memo)] = stack[-1]
        elif operation in GETS:  # BINGET, LONG_BINGET
            stack.append(self.memo[self.number(GETS[operation])])
        elif operation in STRINGS:  # BINUNICODE and its kin, and Python 2's strings
            stack.append(self.take(self.number(STRINGS[operation])).decode())
        elif operation in NUMBERS:  # BININT and its kin, BINFLOAT
            stack.append(self.number(NUMBERS[operation]))
        elif operation in LONGS:  # LONG1, LONG4
            content = self.take(self.number(LONGS[operation]))
            stack.append(int.from_bytes(content, "little", signed=True))
        elif operation in BYTES:  # BINBYTES and its kin, BYTEARRAY8
            self.take(self.number(BYTES[operation]))
            stack.append(PLACEHOLDER)
        elif operation in CONSTANTS:  # NONE, NEWTRUE, NEWFALSE, EMPTY_TUPLE, EMPTY_SET
            stack.append(CONSTANTS[operation])
        elif operation == b"(":  # MARK
            self.marks.append(len(stack))
        elif operation == b"]":  # EMPTY_LIST
            stack.append([])
        elif operation == b"}":  # EMPTY_DICT
            stack.append({})
        elif operation == b"t":  # TUPLE
            stack.append(tuple(self.since_mark()))
        elif operation in TUPLES:  # TUPLE1, TUPLE2, TUPLE3
            items = [stack.pop() for _ in range(TUPLES[operation])]
            stack.append(tuple(reversed(items)))
        elif operation == b"\x91":  # FROZENSET
            self.since_mark()
            stack.append(PLACEHOLDER)
        elif operation == b"c":  # GLOBAL
            stack.append(self.find(self.line(), self.line()))
        elif operation == b"\x93":  # STACK_GLOBAL
            name, module = stack.pop(), stack.pop()
            stack.append(self.find(module, name))
        elif operation == b"R":  # REDUCE
            arguments, function = stack.pop(), stack.pop()
            stack.append(self.call(function, arguments))
        elif operation in (b"\x81", b"\x92"):  # NEWOBJ, NEWOBJ_EX
            del stack[-1 if operation == b"\x81" else -2 :]
            stack.append(self.call(stack.pop(), ()))
        elif operation == b"Q":  # BINPERSID
            stack.append(self.find_storage(stack.pop()))
        elif operation in (b"b", b"0"):  # BUILD gives an object its attributes: never; POP
            stack.pop()
        elif operation == b"1":  # POP_MARK
            self.since_mark()
        elif operation == b"2":  # DUP
            stack.append(stack[-1])
        elif operation in (b"a", b"e", b"\x90"):  # APPEND, APPENDS, ADDITEMS
            items = [stack.pop()] if operation == b"a" else self.since_mark()
            if isinstance(stack[-1], list):
                stack[-1].extend(items)
        elif operation in (b"s", b"u"):  # SETITEM, SETITEMS
            items = [stack.pop(), stack.pop()][::-1] if operation == b"s" else self.since_mark()
            if isinstance(stack[-1], dict):
                for name, value in zip(items[::2], items[1::2], strict=False):
                    # Only text names a weight, and hashing other keys can take for ever.
                    if isinstance(name, str):
                        stack[-1][name] = value
        elif operation == b"\x80":  # PROTO
            self.take(1)
        elif operation == b"\x95":  # FRAME
            self.take(8)
        else:
            raise Refused(f"it is damaged or no PyTorch file (pickle operation {operation!r})")

    def line(self) -> str:
        end = self.data.find(b"\n", self.position, self.position + 200)
        text = self.take(max(end - self.position, 0)).decode()
        self.take(1)
        return text

    def find(self, module, name) -> Global:
        full = f"{module}.{name}" if isinstance(module, str) and isinstance(name, str) else "?"
        if full in KNOWN:
            return Global(full)
        hint = " (it is a TorchScript program)" if full.startswith("__torch__") else ""
        raise Refused(
            f"it asks for {full[:100]!r}, which weights do not need{hint}; nothing was run: in "
            "PyTorch, save the model's state_dict() alone"
        )

    def call(self, function, arguments):
        """What `function` would return, if that is a tensor, a size or a dict to fill."""
        name = function.name if isinstance(function, Global) else ""
        arguments = arguments if isinstance(arguments, tuple) else ()
        if name == "torch._utils._rebuild_tensor_v2" and len(arguments) >= 4:
            return make_tensor(*arguments[:4])
        if name in PARAMETERS and arguments and isinstance(arguments[0], Tensor):
            return arguments[0]
        if name == "torch.Size" and len(arguments) == 1 and isinstance(arguments[0], tuple):
            return arguments[0]
        # Other arguments (Python 2's lists of pairs, a default) would come from another writer.
        if name in DICTS and (not arguments or name != "collections.OrderedDict"):
            return {}
        if name in INERT:
            return PLACEHOLDER
        raise Refused(f"it is damaged or no PyTorch file (a call of {name or 'a value'})")

    def find_storage(self, reference) -> Storage:
        """The storage that a persistent id of torch.save refers to."""
        known = isinstance(reference, tuple) and len(reference) in (5, 6)
        kind, dtype, key, _, count, view = (*reference, None)[:6] if known else [None] * 6
        known = kind == "storage" and isinstance(dtype, Global) and dtype.name in DTYPES
        if not (known and isinstance(key, str) and is_size(count) and view is None):
            raise Refused("it is damaged or no PyTorch file (a storage of unknown kind)")
        storage = self.storages.setdefault(key, Storage(key, DTYPES[dtype.name], count))
        if (storage.dtype, storage.count) != (DTYPES[dtype.name], count):
            raise Refused(f"it is damaged: its storage {key[:100]!r} has two types or sizes")
        return storage
