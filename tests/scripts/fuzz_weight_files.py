# SPDX-License-Identifier: Apache-2.0
"""Damages the fixtures in thousands of ways; each file must be read or refused, and cheaply.

python -m tests.scripts.fuzz_weight_files --count=20000 --seed=0
"""

import argparse
import collections
import io
import random
import resource
import struct
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import numpy as np

from evit_jax.errors import InputError
from evit_jax.weights.files import read_tensors

FOLDER = Path(__file__).parents[1] / "fixtures" / "torch"
FILES = sorted(path for path in FOLDER.iterdir() if path.suffix in {".pth", ".pt", ".bin", ".npz"})
FILES += sorted(FOLDER.glob("*.safetensors"))
EXTREMES = [0, 1, 2, 0x7F, 0xFF, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1,
            2**64 - 1, 10**9]  # fmt: skip
# Pickle operations that allocate, nest, call or jump, and words of the other formats.
OPERATIONS = b"]})(\x94012\x85\x86tRb\x81\x92QsuaeN\x89\x93."
TOKENS = [bytes([operation]) for operation in OPERATIONS]
TOKENS += [b"r\xff\xff\xff\x7f", b"\x8b\xff\xff\xff\x7f", b"\x8e" + b"\xff" * 8, b"K\x00", b"h\x02",
           b"\x96" + b"\x00" * 6 + b"\x01\x00", b"M\xff\xff", b"J\xff\xff\xff\xff", b"\x8a\x01\xff",
           b"\x8a\x08" + b"\xff" * 7 + b"\x7f", b"G" + b"\x7f" * 8, b"X" + b"\x00" * 4, b"h\x01",
           b"cposix\nsystem\n", b"ctorch\nHalfStorage\n", b"ctorch\nDoubleStorage\n",
           b"ctorch._utils\n_rebuild_tensor_v2\n", b"F64", b"BF16", b"F8_E4M3", b"[", b"{", b"-1",
           b"9" * 18, b"1e9", b"null", b"'|O'", b"<i8", b"(1000000000000,)", b"\x00" * 64,
           b"\xff" * 8, b"PK\x05\x06", b"PK\x01\x02"]  # fmt: skip
LIMIT_SECONDS = 1.0
LIMIT_BYTES = 512 << 20  # the fixtures' own sizes are a few KB, and 64 MiB may be unfolded


def mutate(content: bytes, rng: random.Random) -> bytes:
    """One to four random changes."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 3))):
        at, length = rng.randrange(len(data) + 1), rng.choice((1, 1, 2, 4, 8, 64))
        kind = rng.randrange(8)
        if kind == 0:
            data[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 1 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            del data[at if rng.random() < 0.3 else -rng.randrange(1, 40) :]
        elif kind == 3:
            data[at:at] = rng.randbytes(length)
        elif kind == 4:
            token = rng.choice(TOKENS)
            data[at : at + len(token) * rng.randrange(2)] = token * rng.choice((1, 1, 1, 500))
        elif kind == 5:
            code = rng.choice("BHIQ")
            number = struct.pack(f"<{code}", rng.choice(EXTREMES) % 256 ** struct.calcsize(code))
            data[at : at + len(number)] = number
        elif kind == 6:
            other = rng.randrange(len(data) + 1)
            data[at:at] = data[other : other + rng.choice((4, 16, 64, 1000))]
        else:
            del data[at : at + length]
    return bytes(data)


def mutate_inside(content: bytes, rng: random.Random) -> bytes:
    """Changes what the outer checks protect: zip members under a right checksum, or a header."""
    if not content.startswith(b"PK"):
        if content[8:9] != b"{":
            return mutate(content, rng)
        end = 8 + int.from_bytes(content[:8], "little")
        header = mutate(content[8:end], rng)
        return len(header).to_bytes(8, "little") + header + content[end:]
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {info: archive.read(info) for info in archive.infolist()}
    chosen = [info for info in members if info.filename.endswith(("data.pkl", ".npy"))]
    if rng.random() < 0.1:
        chosen = list(members)
    target, file = rng.choice(chosen), io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for info, inner in members.items():
            inner = mutate(inner, rng) if info is target else inner
            archive.writestr(info.filename, inner, info.compress_type)
    return file.getvalue()


def outcome(path: Path) -> str:
    """`read`, `refused`, or what else happened."""
    started = time.process_time()
    try:
        tensors = read_tensors(path)
        arrays = all(isinstance(array, np.ndarray) for array in tensors.values())
        result = "read" if tensors and arrays else "not arrays"
    except InputError as error:
        message = str(error)
        result = "refused" if path.name in message and "\n" not in message else "a bad message"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        result = f"{type(error).__name__}: {error}"
    seconds = time.process_time() - started
    return result if seconds < LIMIT_SECONDS else f"{result} after {seconds:.1f} s"


def fuzz(count: int, seed: int, folder: Path) -> collections.Counter:
    """Outcomes of `count` damaged files; the culprits stay in `folder`."""
    rng, outcomes = random.Random(seed), collections.Counter()
    originals = {path.name: path.read_bytes() for path in FILES}
    assert all(outcome(path) == "read" for path in FILES)
    for number in range(count):
        name = FILES[number % len(FILES)].name
        damage = mutate_inside if rng.random() < 0.7 else mutate
        path = folder / f"{number}_{name}"
        path.write_bytes(damage(originals[name], rng))
        found = outcome(path)
        outcomes[found] += 1
        if found in ("read", "refused"):
            path.unlink()
        else:
            print(f"{path}: {found}", file=sys.stderr)
    return outcomes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=20000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + (4 << 30), now + (4 << 30)))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcomes = fuzz(options.count, options.seed, Path(tempfile.mkdtemp(prefix="fuzz_weights_")))
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
    other = outcomes.total() - outcomes["read"] - outcomes["refused"]
    print(
        f"{options.count} files: {outcomes['read']} read, {outcomes['refused']} refused, "
        f"{other} other; memory grew by {grown >> 20} MiB"
    )
    return int(other > 0 or grown > LIMIT_BYTES)


if __name__ == "__main__":
    sys.exit(main())
