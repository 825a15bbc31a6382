# SPDX-License-Identifier: Apache-2.0
"""What to measure on an accelerator, in which order, and what came of it."""

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

from tests.accelerator.cases import rows_of, take_turns
from tests.accelerator.tables import markdown
from tests.accelerator.workers import Failed, Worker, brief

ROOT = Path(__file__).parents[2]
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
    """The two processes, what to measure with them, and what came of it.

    Its flags are those of __main__.py.
    """

    def __init__(self, flags):
        self.flags, self.out = flags, Path(flags.out)
        self.out.mkdir(parents=True, exist_ok=True)
        self.start = time.monotonic()
        self.rehearse = flags.rehearse
        # Parts share programs, and may follow a process that was ended.
        self.programs = tempfile.TemporaryDirectory()
        memory = dict(XLA_PYTHON_CLIENT_PREALLOCATE="false", XLA_PYTHON_CLIENT_MEM_FRACTION="0.93")
        cache = dict(JAX_COMPILATION_CACHE_DIR=self.programs.name)
        self.jax = Worker("tests.accelerator.jax_side", self.out / "jax.log", cache | memory)
        memory = dict(PYTORCH_CUDA_ALLOC_CONF="expandable_segments:True")
        self.torch = Worker("tests.accelerator.torch_side", self.out / "torch.log", memory)
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
            return Part(f"attention of {model.label}", 60, run)

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
        asked["limit"] = deadline - time.monotonic() - TURNS
        rows = self.jax.ask("correctness", deadline, **asked)
        self.results["correctness"] = [row | dict(model=model.label) for row in rows]

    def attention(self, model: Model, batch_size: int, deadline: float) -> None:
        heads = model.sizes["num_heads"]
        asked = dict(lengths=model.tokens, num_heads=heads, batch_size=batch_size)
        asked["head_width"] = model.sizes["embed_dim"] // heads
        asked["limit"] = deadline - time.monotonic() - TURNS
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
            cwd=ROOT,
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
        rounds = take_turns(figures, deadline, awaited=batch_size == 1, **self.timing)
        for row in rows_of(rounds, figures, batch_size, mode, self.results["peak"]):
            shared = dict(model=model.label, **case, beside_compiled=compiled)
            self.results["speed"].append(shared | row)
        errors += [
            f"{name}: {one['error']}" for (_, name), one in figures.items() if "error" in one
        ]
        for side in sides:
            if side.process is not None:
                side.ask("release", deadline)
        if not rounds:
            raise Failed("; ".join(errors))
        for error in errors:
            self.note(f"{mode}, {model.label}, batch {batch_size}: {error}")
