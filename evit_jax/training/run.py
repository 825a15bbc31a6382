# SPDX-License-Identifier: Apache-2.0
"""What train.py's main need not hold: a run's data, its calendar, its programs and its watch."""

import functools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import flax.linen as nn
import jax

from evit_jax.data import open_source, pipeline
from evit_jax.data.labels import open_label_maps
from evit_jax.errors import InputError
from evit_jax.plan import stages
from evit_jax.plan.files import read_plan
from evit_jax.runtime.background import Prefetch, Programs
from evit_jax.runtime.parallel import DataParallel
from evit_jax.training import report
from evit_jax.training.clock import Clock, Startup
from evit_jax.training.recorder import Recorder
from evit_jax.training.workdir import broken


def use_plan_file(config) -> None:
    """Puts the counts and the reducer of config.model.plan in their places, and unsets it.

    So the run's own record has them, wherever the file goes.

    Raises:
      InputError: no such file, or counts or rates beside it.
    """
    if not config.model.get("plan"):
        return
    counts = ("keep_rate", "keep_rates", "tokens", "macs", "layers")
    if taken := [name for name in counts if config.model[name] is not None]:
        raise InputError(
            f"model.plan has counts of its own: leave out model.{taken[0]} "
            f"(--config=FILE.py:{taken[0]}=None unsets a configuration's)"
        )
    with config.ignore_type(), config.unlocked():
        config.model.update(read_plan(config.model.plan))
    config.model.plan = ""


def check_sandwich(config, model) -> None:
    """Raises InputError where a sandwich would train parameters that the model does not have."""
    dense = all(entry is None for entry in model.kept)
    if config.sandwich and dense and isinstance(model.reducer, nn.Module):
        raise InputError(
            "a method that learns has its parameters where model.keep_rate reduces, and nothing is "
            f"reduced: set one of the sandwich's, such as :keep_rate={min(config.sandwich)}"
        )


class Data:
    """The two splits of a run's data, and the batches of this host made of them."""

    def __init__(self, config, model, card, *, logits=None):
        """Opens both splits.

        Args:
          config: the run's.
          model: gives the images' size and the number of classes.
          card: the model's `Preprocessing`.
          logits: a teacher's for the training images, or None.

        Raises:
          InputError: data that cannot be used, or more classes than the model has.
        """
        where = dict(folder=config.data.dir, classes=config.data.classes, cache=config.data.cache)
        copies = max(config.run.workers, 1)
        self.train = open_source(config.data.name, "train", **where, copies=copies)
        self.test = open_source(config.data.name, "test", **where)
        if len(self.train.classes) > model.num_classes:
            raise InputError(
                f"the data has {len(self.train.classes)} classes and the model only "
                f"{model.num_classes}; set --config.model.num_classes"
            )
        self.maps = None
        if folder := config.labels.dir:
            if config.mix.mixup or config.mix.cutmix:
                raise InputError(
                    "label maps are mixed by patches: use mix.token instead of mix.mixup and "
                    "mix.cutmix, or labels.dir=''"
                )
            self.maps = open_label_maps(folder, self.train, model.num_classes)
        self.config, self.card, self.logits = config, card, logits
        self.view = dict(
            size=model.image_size,
            interpolation=card.interpolation,
            host=jax.process_index(),
            hosts=jax.process_count(),
            threads=config.run.threads,
            damaged=config.data.damaged,
        )

    def train_batches(self, start: int) -> Iterator[dict]:
        """The training batches from step `start` (counted from 0) on, without end."""
        return pipeline.train_batches(
            self.train,
            **self.config.augment,
            fill=self.card.fill,
            logits=self.logits,
            maps=self.maps,
            seed=self.config.seed,
            batch_size=self.config.batch_size,
            start=start,
            workers=self.config.run.workers,
            **self.view,
        )

    def test_batches(self) -> Iterator[dict]:
        """One pass over the test images."""
        size = self.config.run.test_batch_size
        view = self.view | self.card.view
        return pipeline.eval_batches(self.test, batch_size=size, **view)


def placed(batch: dict, devices: DataParallel) -> tuple[dict, dict]:
    """A batch of this host -> (what the devices need of it, there; the rest, here)."""
    batch, host = pipeline.split_host_arrays(batch)
    return devices.put(batch), host


class Due(NamedTuple):
    """What has to be done after a step."""

    log: bool
    evaluate: bool
    save: bool
    stop: bool


class Calendar:
    """Epochs as steps, and what is due after which."""

    def __init__(self, config, images: int):
        """`images` is the number of training images."""
        self.config, self.images = config, images
        self.total = max(self.steps(config.epochs), 1)

    def steps(self, epochs: float) -> int:
        """Epochs -> steps."""
        return round(epochs * self.images / self.config.batch_size)

    def epoch(self, step: int) -> float:
        """Passes over the training images after this step."""
        return step * self.config.batch_size / self.images

    def at(self, step: int) -> dict[str, float]:
        """Where a line of metrics.jsonl belongs."""
        return dict(step=step, epoch=self.epoch(step))

    def completes(self, step: int, epochs: float) -> bool:
        """Whether this step ends a stretch of so many epochs, or the run."""
        every = epochs * self.images / self.config.batch_size
        return stages.completes(step, every, total=self.total)

    def due(self, step: int, *, stop: bool) -> Due:
        """What has to be done after this step, where somebody may have asked to stop."""
        run, last = self.config.run, step == self.total
        stop = stop and not last
        return Due(
            log=step % run.log_every == 0 or last,
            evaluate=self.completes(step, run.eval_every),
            save=self.completes(step, run.checkpoint_every) or stop,
            stop=stop,
        )


class StagePrograms:
    """The training step of each stage of the keep rate, compiled in the background ahead of it."""

    def __init__(self, compile_stage: Callable, table: tuple[stages.Stage, ...], seed: int):
        """`compile_stage(stage)` returns the program."""
        self.table, self.seed, self.used = table, seed, set()
        self.programs = Programs(compile_stage)

    def stage(self, step: int) -> stages.Stage:
        """The stage in which this step is taken."""
        return stages.stage_at(self.table, step - 1, self.seed)

    def start(self, step: int) -> None:
        """Begins to compile this step's program."""
        self.programs.start(self.stage(step))

    def at(self, step: int, watch: "Watch") -> Callable:
        """This step's program; a new stage is logged, and the later ones begin to compile."""
        stage = self.stage(step)
        if stage not in self.used:
            self.used.add(stage)
            watch.new_stage(step, stage, functools.partial(self.programs.wait, stage))
            for later in self.table:
                if later.step >= stage.step:
                    self.programs.start(later)
        return self.programs[stage]

    def close(self) -> None:
        self.programs.close()


class Watch:
    """Waits for steps and batches in the right order, checks figures, and keeps the time.

    A step is checked while the next one runs: with more steps in flight the wait for data could not
    be told from the wait for the devices.
    """

    def __init__(
        self,
        workdir: Path,
        model,
        batches: Prefetch,
        checkpoints,
        log: Recorder,
        clock: Clock,
        startup: Startup,
    ):
        self.workdir, self.model = workdir, model
        self.batches, self.checkpoints = batches, checkpoints
        self.log, self.clock, self.startup = log, clock, startup
        self.previous = None  # (step, figures, host arrays) of the step that was taken last

    def next_batch(self) -> dict:
        """The next batch, on the devices."""
        if self.previous and not self.batches.ready:
            self.check_previous()  # from here on the devices have nothing to do
        with self.clock.waiting():
            batch, self.host = next(self.batches)
        self.log.see(self.host)
        return batch

    def new_stage(self, step: int, stage: stages.Stage, wait: Callable[[], str]) -> None:
        """Waits for the program of a new stage, and logs both."""
        with self.clock.paused():  # compiling is not training
            self.log.say(f"step {step}: {report.stage_line(self.model, stage)}, {wait()}")
        if not self.previous:
            self.startup.mark("compiling and first batch")

    def step_taken(self, step: int, figures: dict[str, jax.Array], images: int) -> None:
        """Notes a step that the devices were given, and checks the one before it."""
        if not self.previous:
            jax.block_until_ready(figures)
            self.startup.mark("first step")
            self.log.say(self.startup.line())
        self.clock.images += images
        self.check_previous()
        self.previous = step, figures, self.host
        self.log.bar.update()

    def check_previous(self) -> None:
        """Awaits the last step; raises InputError if its loss or gradients are not finite."""
        if not self.previous:
            return
        step, figures, host = self.previous
        figures = {name: float(value) for name, value in figures.items()}
        if not all(map(math.isfinite, figures.values())):
            self.checkpoints.wait()
            images, latest = host["index"].tolist(), self.checkpoints.latest
            raise broken(self.workdir, step, figures, images, latest, jax.process_index())


class Profile:
    """A trace of some steps, in WORKDIR/profile, for TensorBoard or Perfetto."""

    def __init__(self, text: str, workdir: Path):
        """`text` is a range of steps such as 100:110, last one included, or "" for none.

        Raises:
          InputError: anything else.
        """
        self.folder, self.first, self.last = workdir / "profile", None, None
        self.running = False
        if not text:
            return
        first, _, last = text.partition(":")
        if not (first.isdigit() and last.isdigit() and 1 <= int(first) <= int(last)):
            raise InputError(
                f"--profile must be the first and the last step of the trace, such as 100:110, "
                f"got {text!r}"
            )
        self.first, self.last = int(first), int(last)

    def before(self, step: int) -> None:
        """Begins the trace, if this is its first step."""
        if step == self.first:
            jax.profiler.start_trace(str(self.folder))
            self.running = True

    def after(self, step: int, figures: dict[str, jax.Array], log: Recorder) -> None:
        """Ends the trace, if this was its last step."""
        if self.running and step == self.last:
            jax.block_until_ready(figures)
            jax.profiler.stop_trace()
            self.running = False
            log.say(f"wrote a trace of steps {self.first} to {self.last} to {self.folder}")
