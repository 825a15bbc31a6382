# SPDX-License-Identifier: Apache-2.0
"""Every figure that an accelerator is needed for, most valuable first, within a budget of time.

tests/accelerator.sh [REFERENCE] [--out=DIR] [--budget=540] [--resume=results.json] [--rehearse]

On a GPU or TPU machine with the project's JAX; where its python3 has torch and timm as well (and
torch sees the GPU), DeiT of timm and, with a REFERENCE checkout of
https://github.com/youweiliang/evit, the official EViT run beside ours: autocast to bfloat16, plain
and torch.compile'd, AdamW fused. Nothing is downloaded or installed.

  speed        DeiT-S and DeiT-B in bfloat16: dense, EViT at 0.7 and 0.5, ToMe at the
               multiply-accumulates of EViT at 0.7; batches of 1, 64, 256 and 1024; inference, and
               training steps (forward, backward, AdamW). All variants of a case, PyTorch's in a
               process beside, take turns of queued calls, every other round backwards; at batch 1
               once more with each call awaited. Figures are medians of rounds.
  peak         the fastest matrix product and copy, which the shares are of
  correctness  logits in bfloat16 beside float32, float32 beside the CPU's; the tests of the
               attention's forms, run on the device
  attention    the attention branch in the model's form, the CPU's, and by
               `jax.nn.dot_product_attention` with XLA and cuDNN, at the model's token counts
  profile      the kernels that take most of the time

results.json and tables.md in DIR are written after every part. A part that fails leaves its error
and the next one goes on; one that no longer fits into --budget (seconds) is listed as skipped, and
a second run with --resume, the first one's results.json, measures those. --rehearse runs all of it
on a tiny model in about a minute, on a CPU too.
"""

import argparse
import functools
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tests.accelerator_tables import markdown
from tests.accelerator_worker import Failed, Worker, brief

OURS = ("dense", "evit 0.7", "evit 0.5", "tome")
THEIRS = ("timm", "EViT 1", "EViT 0.7", "EViT 0.5")
TURNS = 15  # seconds that those of a case may take
# The tests that compare the forms of every chip; float32 products must not round to TF32.
FORM_TESTS = ("tests/models/test_forms.py", "tests/models/test_attention.py")
WHOLE = dict(JAX_DEFAULT_MATMUL_PRECISION="highest")


class Model(NamedTuple):
    """A model under both frameworks' names for its sizes."""

    label: str
    spec: str  # ours
    layers: tuple[int, ...]  # reducing blocks
    tokens: tuple[int, ...]  # of blocks at keep rate 1 and after each reducing block at 0.7
    sizes: dict[str, int]  # timm's and the official model's


def deit(size: str, width: int, heads: int) -> Model:
    """DeiT "small" or "base"."""
    sizes = dict(img_size=224, patch_size=16, embed_dim=width, depth=12, num_heads=heads)
    names = f"DeiT-{size[0].upper()}", f"deit_{size}_patch16_224"
    return Model(*names, (3, 6, 9), (197, 140, 100, 72), sizes | dict(num_classes=1000))


def tiny() -> Model:
    sizes = dict(img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=2, num_classes=10)
    spec = "vit:width=32,depth=4,num_heads=2,image_size=32,patch_size=8,num_classes=10"
    return Model("tiny", spec, (1, 2, 3), (17, 14), sizes)


class Part(NamedTuple):
    """One thing to measure."""

    label: str
    seconds: float  # it is not begun with less time left
    run: Callable[[float], object]  # deadline by time.monotonic() -> what goes into the results


class Session:
    """The two processes, what to measure with them, and what came of it."""

    def __init__(self, flags: argparse.Namespace):
        self.flags, self.out = flags, Path(flags.out)
        self.out.mkdir(parents=True, exist_ok=True)
        self.start = time.monotonic()
        self.rehearse = flags.rehearse
        # Parts share programs, and may follow a process that was ended.
        self.programs = tempfile.TemporaryDirectory()
        memory = dict(XLA_PYTHON_CLIENT_PREALLOCATE="false", XLA_PYTHON_CLIENT_MEM_FRACTION="0.93")
        cache = dict(JAX_COMPILATION_CACHE_DIR=self.programs.name)
        self.jax = Worker("tests.accelerator_jax", self.out / "jax.log", cache | memory)
        memory = dict(PYTORCH_CUDA_ALLOC_CONF="expandable_segments:True")
        self.torch = Worker("tests.accelerator_torch", self.out / "torch.log", memory)
        self.theirs = THEIRS if flags.reference else THEIRS[:1]
        self.timing = (
            dict(rounds=2, seconds=0.002) if self.rehearse else dict(rounds=7, seconds=0.1)
        )
        self.results = dict(
            machine={}, parts={}, peak=None, speed=[], attention=[], profile=[], correctness=[],
            form_tests=None, notes=[], skipped=[], errors={}, rehearsal=self.rehearse,
        )  # fmt: skip
        if flags.resume:
            earlier = json.loads(Path(flags.resume).read_text())
            self.results |= earlier | dict(skipped=[], errors={}, notes=[])

    def open(self) -> None:
        """Starts both processes and notes what they run on."""
        limit = time.monotonic() + 90
        machine = self.jax.ask("describe", limit)
        if machine["platform"] == "cpu" and not self.rehearse:
            raise SystemExit("JAX sees no accelerator here; --rehearse runs on a CPU")
        if machine["device"] != self.results["machine"].get("device", machine["device"]):
            raise SystemExit("--resume: those figures are of another device")
        self.results["machine"] = machine
        try:
            found = self.torch.ask("describe", limit)
            if machine["platform"] != "cpu" and found["platform"] != "cuda":
                raise Failed("torch has no accelerator here")
            machine["torch"] = found
            if not self.flags.reference:
                self.note("the official EViT was left out: no REFERENCE was given")
        except Failed as error:
            self.theirs = ()
            why = str(error).strip().splitlines()[-1]
            self.note(f"everything of PyTorch was left out: {why}")
            self.torch.stop()

    def note(self, text: str) -> None:
        self.results["notes"].append(text)
        self.say(text)

    def say(self, text: str) -> None:
        print(f"{time.monotonic() - self.start:5.0f} s  {text}", file=sys.stderr, flush=True)

    def parts(self) -> list[Part]:
        """All there is to measure, most valuable first."""
        small, base = deit("small", 384, 6), deit("base", 768, 12)
        size, lone = 256, 1
        if self.rehearse:
            small, size = tiny(), 4

        def speed(model, mode, batch_size, compiled=False):
            label = f"{mode}, {model.label}, batch {batch_size}{', compiled' if compiled else ''}"
            seconds = (45 if mode == "inference" else 80) + (75 if compiled else 0)
            run = functools.partial(self.speed, model, mode, batch_size, compiled)
            return Part(label, seconds, run)

        def profile(mode):
            run = functools.partial(self.profile, small, mode, size)
            return Part(f"profile of {mode}", 40, run)

        def attention(model):
            run = functools.partial(self.attention, model, 8 if self.rehearse else size)
            return Part(f"attention of {model.label}", 45, run)

        parts = [
            Part("peak", 20, self.peak),
            Part("correctness", 45, functools.partial(self.correctness, small)),
            speed(small, "inference", size),
            speed(small, "training", size),
            profile("inference"),
            attention(small),
            speed(small, "inference", size, compiled=True),
            profile("training"),
            speed(small, "inference", lone),
            Part("tests of the forms", 60, self.form_tests),
        ]
        if not self.rehearse:
            parts += [
                speed(base, "inference", size),
                speed(base, "training", 64),
                speed(small, "training", size, compiled=True),
                attention(base),
            ]
            for compiled in (False, True):
                for mode, model in itertools.product(("inference", "training"), (small, base)):
                    parts += [speed(model, mode, one, compiled) for one in (64, 1024, size, lone)]
        if not self.theirs:
            parts = [part for part in parts if "compiled" not in part.label]
        return list({part.label: part for part in parts}.values())

    def run(self) -> None:
        """Measures one part after the other and writes what there is after each."""
        deadline = self.start + self.flags.budget
        self.open()
        todo = [part for part in self.parts() if part.label not in self.results["parts"]]
        for number, part in enumerate(todo, 1):
            left = deadline - time.monotonic()
            if left < part.seconds and not (self.rehearse and left > 0):
                self.results["skipped"].append(part.label)
                continue
            self.say(f"{number} of {len(todo)}: {part.label}")
            begin = time.monotonic()
            try:
                part.run(min(deadline, begin + 2 * part.seconds + 20))
                self.results["parts"][part.label] = time.monotonic() - begin
            except Exception as error:
                self.results["errors"][part.label] = brief(error)
                self.say(f"failed: {brief(error)}")
            self.write()
        self.write()

    def write(self) -> None:
        self.results["seconds"] = time.monotonic() - self.start
        text = json.dumps(self.results, indent=1)
        for name, content in (("results.json", text), ("tables.md", markdown(self.results))):
            whole = self.out / f"{name}.part"
            whole.write_text(content + "\n")
            whole.replace(self.out / name)

    def close(self) -> None:
        self.jax.stop()
        self.torch.stop()
        self.programs.cleanup()

    def peak(self, deadline: float) -> None:
        sizes = dict(sides=[4096, 8192, 16384], copied=2**30)
        if self.rehearse:
            sizes = dict(sides=[128, 256], copied=2**20)
        self.results["peak"] = self.jax.ask("peak", deadline, **sizes, **self.timing)

    def correctness(self, model: Model, deadline: float) -> None:
        asked = dict(model=model.spec, names=OURS, batch_size=16)
        rows = self.jax.ask("correctness", deadline, **asked)
        self.results["correctness"] = [row | dict(model=model.label) for row in rows]

    def attention(self, model: Model, batch_size: int, deadline: float) -> None:
        heads = model.sizes["num_heads"]
        asked = dict(lengths=model.tokens, num_heads=heads, batch_size=batch_size)
        asked["head_width"] = model.sizes["embed_dim"] // heads
        self.results["attention"] += self.jax.ask("attention", deadline, **asked, **self.timing)

    def profile(self, model: Model, mode: str, batch_size: int, deadline: float) -> None:
        asked = dict(model=model.spec, mode=mode, batch_size=batch_size, names=OURS[1:2], top=20)
        asked["keep"] = str(self.out / f"{mode}.trace.json.gz")
        asked["limit"] = deadline - time.monotonic() - TURNS
        found = self.jax.ask("profile", deadline, **asked)
        self.results["profile"].append(found | dict(model=model.label))

    def form_tests(self, deadline: float) -> None:
        """Runs the project's own tests of the forms on the device."""
        tests = FORM_TESTS
        if self.rehearse:
            tests = [f"{FORM_TESTS[0]}::test_a_form_has_the_exact_gradient"]
        command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-q", "--tb=line", *tests]
        self.jax.stop()  # its memory is not needed meanwhile
        done = subprocess.run(
            [*command, "--optimized"],
            capture_output=True,
            text=True,
            env=os.environ | WHOLE,
            timeout=max(deadline - time.monotonic(), 1),
        )
        lines = done.stdout.strip().splitlines() or done.stderr.strip().splitlines()
        self.results["form_tests"] = dict(exit_code=done.returncode, lines=lines[-20:])
        if done.returncode:
            raise Failed(lines[-1] if lines else "pytest did not run")

    def speed(
        self, model: Model, mode: str, batch_size: int, compiled: bool, deadline: float
    ) -> None:
        """A case: all variants take turns."""
        case = dict(mode=mode, batch_size=batch_size)
        names = {self.jax: list(OURS), self.torch: list(self.theirs)}
        if compiled:  # ours of the same keep rates are the measure
            names = {
                self.jax: list(OURS[:3]),
                self.torch: [f"{name} compiled" for name in self.theirs],
            }
        more = {
            self.jax: dict(model=model.spec),
            self.torch: dict(
                sizes=model.sizes,
                layers=model.layers,
                reference=str(Path(self.flags.reference).resolve()) if self.flags.reference else "",
                backend="aot_eager" if self.rehearse else "inductor",
            ),
        }
        sides = [side for side in names if names[side]]
        limit = deadline - time.monotonic() - TURNS  # what is left then is for the turns
        for side in sides:
            side.send("prepare", names=names[side], limit=limit * 0.8, **more[side], **case)
        figures, errors = {}, []
        for side in sides:
            try:
                for name, found in side.receive(deadline - TURNS).items():
                    figures[side, name] = found
            except Failed as error:
                errors.append(f"{side.module}: {error}")
        rows = self.take_turns(figures, deadline, awaited=batch_size == 1)
        if rows:
            self.results["speed"] += self.figures_of(rows, figures, model, case, compiled)
        errors += [
            f"{name}: {one['error']}" for (_, name), one in figures.items() if "error" in one
        ]
        for side in sides:
            if side.process is not None:
                side.ask("release", deadline)
        if not rows:
            raise Failed("; ".join(errors))
        for error in errors:
            self.note(f"{mode}, {model.label}, batch {batch_size}: {error}")

    def take_turns(self, figures: dict, deadline: float, *, awaited: bool) -> dict:
        """(worker, variant) -> dict(queued=seconds of each round, awaited=...).

        A variant whose turn fails gets an `error` among its figures, and no others.
        """
        live = [key for key, found in figures.items() if "error" not in found]

        def turn(key, calls, queued):
            side, name = key
            return side.ask("turn", deadline, name=name, calls=calls, queued=queued)

        calls, rounds = {}, {key: {} for key in live}
        ways = ("queued", "awaited") if awaited else ("queued",)
        for way in ways:
            for number in range(-1, self.timing["rounds"]):  # the first one counts calls
                for key in live[:: -1 if number % 2 else 1]:
                    if "error" in figures[key]:
                        continue
                    try:
                        spent = turn(key, calls.get(key, 1), way == "queued")
                    except Failed as error:
                        figures[key]["error"] = str(error)
                        continue
                    if number < 0:
                        fitting = round(self.timing["seconds"] / spent)
                        calls[key] = min(max(fitting, 1), 300)
                    else:
                        rounds[key].setdefault(way, []).append(spent)
        return {key: some for key, some in rounds.items() if "error" not in figures[key]}

    def figures_of(
        self, rounds: dict, figures: dict, model: Model, case: dict, compiled: bool
    ) -> list[dict]:
        """The rows of a case."""
        speeds = {key[1]: case["batch_size"] / np.asarray(some["queued"])
                  for key, some in rounds.items()}  # fmt: skip
        peak = (self.results["peak"] or {}).get("flops_per_second")
        rows = []
        for (side, name), some in rounds.items():
            found, speed = figures[side, name], speeds[name]
            rate = dict(dense="1", timm="1", tome="0.7").get(name.split()[0], name.split()[-1])
            row = dict(model=model.label, **case, beside_compiled=compiled, variant=name)
            row |= dict(framework="JAX" if side is self.jax else "PyTorch", **found)
            row |= spread("images_per_second", speed)
            row["ms"] = 1000 * case["batch_size"] / row["images_per_second"]
            if "awaited" in some:
                row |= spread("latency_ms", 1000 * np.asarray(some["awaited"]))
            if "dense" in speeds:
                row |= spread("over_dense", speed / speeds["dense"])
            if side is self.jax:
                work = found["flops"] * (3 if case["mode"] == "training" else 1)
                row["flops_per_second"] = work * row["images_per_second"]
                row["peak_share"] = row["flops_per_second"] / peak if peak else None
                row["over"] = {
                    other: float(np.median(speed / theirs))
                    for other, theirs in speeds.items()
                    if other.startswith(f"EViT {rate}") or (other[:4] == "timm" and rate == "1")
                }
            rows.append(row)
        return rows


def spread(name: str, values: np.ndarray) -> dict:
    """Median, and lowest and highest as NAME_range."""
    low, middle, high = (float(f(values)) for f in (np.min, np.median, np.max))
    return {name: middle, f"{name}_range": [low, high]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("reference", nargs="?", default="")
    parser.add_argument("--out", default="./accelerator_results")
    parser.add_argument("--budget", type=float, default=540)
    parser.add_argument("--resume", default="")
    parser.add_argument("--rehearse", action="store_true")
    flags = parser.parse_args()
    if flags.reference and not (Path(flags.reference) / "evit.py").is_file():
        parser.error(f"{flags.reference} has no evit.py; give a checkout of youweiliang/evit")
    session = Session(flags)
    try:
        session.run()
    finally:
        session.close()
    print((session.out / "tables.md").read_text())


if __name__ == "__main__":
    main()
