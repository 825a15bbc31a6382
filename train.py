# SPDX-License-Identifier: Apache-2.0
"""Trains a Vision Transformer whose blocks reduce their tokens.

python train.py --config=configs/NAME.py[:debug] --workdir=DIR [--config.FIELD=VALUE ...]

Run the same line again to go on from the last checkpoint.
"""

import contextlib
import functools
import json
import math
from pathlib import Path

import jax
from absl import flags
from ml_collections import config_flags

from evit_jax import cli
from evit_jax.data import open_source, pipeline
from evit_jax.errors import InputError
from evit_jax.measure import timing
from evit_jax.models import build_model, init_params, load_params, preprocessing
from evit_jax.plan import stages
from evit_jax.plan.flops import macs
from evit_jax.runtime import parallel, processes
from evit_jax.runtime.background import Prefetch, Programs
from evit_jax.spec import flatten
from evit_jax.training import metrics, optim, recorder, report, steps
from evit_jax.training.clock import Clock, Startup
from evit_jax.training.mix import Mix
from evit_jax.training.ranges import check_ranges
from evit_jax.training.teachers import open_teacher
from evit_jax.training.workdir import broken, claim

CONFIG = config_flags.DEFINE_config_file("config", None, "a file in configs/", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "folder for checkpoints, metrics and events")
PROCESSES = flags.DEFINE_string(
    "processes", "", 'of one run: "auto" on TPU pods and Slurm, or HOST:PORT,COUNT,NUMBER'
)
flags.mark_flag_as_required("config")


def main() -> None:
    startup = Startup()
    config = CONFIG.value
    check_ranges(flatten(config.to_dict()))
    processes.start_processes(PROCESSES.value)
    stop = processes.Stop()
    host, hosts = jax.process_index(), jax.process_count()

    # --------------------------------------------------------------------- devices, model, teacher
    mix = Mix(**config.mix)
    devices = parallel.choose(config.run.parallel, shard_params=config.run.shard_params)
    model = build_model(**config.model)
    accumulate = config.run.accumulate or steps.micro_batches(model, config.batch_size)
    parts = dict(accumulate=accumulate, pairs=bool(mix.mixup or mix.cutmix))
    devices.check_batch_size("batch_size", config.batch_size, **parts)
    devices.check_batch_size("run.test_batch_size", config.run.test_batch_size)
    card = preprocessing(config.model.name)
    teacher = open_teacher(model, **config.distill)

    # ---------------------------------------------------------------------------------------- data
    view = dict(size=model.image_size, interpolation=card.interpolation, host=host, hosts=hosts)
    view |= dict(threads=config.run.threads, damaged=config.data.damaged)
    train_images = 1000 * config.batch_size  # a dry run needs no data; epochs are what it shows
    if not config.dry_run:
        where = dict(folder=config.data.dir, classes=config.data.classes, cache=config.data.cache)
        copies = max(config.run.workers, 1)
        train_source = open_source(config.data.name, "train", **where, copies=copies)
        test_source = open_source(config.data.name, "test", **where)
        train_images = len(train_source)
        if len(train_source.classes) > model.num_classes:
            raise InputError(
                f"the data has {len(train_source.classes)} classes and the model only "
                f"{model.num_classes}; set --config.model.num_classes"
            )

    def to_steps(epochs: float) -> int:
        return round(epochs * train_images / config.batch_size)

    total = max(to_steps(config.epochs), 1)

    # ----------------------------------------------- stages of the keep rate, optimiser, the steps
    table = stages.open_table(model, config, to_steps)
    settings = dict(config.optimizer)
    warmup_steps = to_steps(settings.pop("warmup_epochs"))
    optimizer, schedule = optim.create(**settings, warmup_steps=warmup_steps, total_steps=total)
    recipe = steps.Recipe(
        preprocessing=card,
        optimizer=optimizer,
        mix=mix,
        seed=config.seed,
        label_smoothing=config.label_smoothing,
        ema_decay=config.ema_decay,
        accumulate=accumulate,
        **teacher.recipe,
    )

    def init(params: dict) -> steps.State:
        return steps.init_state(params, optimizer, ema=config.ema_decay > 0)

    def draw(key: jax.Array) -> steps.State:
        return init(init_params(model, key))

    key = jax.random.key(config.seed)
    shapes = (
        jax.eval_shape(draw, key),
        steps.batch_shapes(
            model.image_size, config.batch_size, model.num_classes * (teacher.logits is not None)
        ),
        teacher.params,
    )

    def compile_stage(stage: stages.Stage):
        models = tuple(model.clone(keep=keep) for keep in (stage.keep, *stage.others))
        step = functools.partial(steps.train_step, models=models, recipe=recipe)
        return devices.compile_train(step, *shapes)

    @functools.cache
    def eval_step(model):
        return devices.compile_eval(
            functools.partial(steps.eval_step, model=model, preprocessing=card)
        )

    if config.dry_run:
        print(report.parameter_table(shapes[0]["params"]), end="\n\n")
        print(report.stage_table(model, table, steps_per_epoch=1000), end="\n\n")
        print("compiling the training step; nothing is run ...", end="\n\n", flush=True)
        compiled = compile_stage(table[0])
        print(report.memory_table(*shapes[:2], compiled, jax.device_count()))
        return

    # -------------------------------------------------------------- the workdir, and where to begin
    # A workdir belongs to one recipe. Its newest complete checkpoint is the state; without one the
    # run starts afresh, from config.weights if there are any. Data, augmentation and dropout are
    # functions of seed and step alone, so the checkpoint needs nothing else.
    if config.new_head and not config.weights:
        raise InputError("new_head is for --config.weights=FILE; without them all is drawn anyway")
    if not WORKDIR.value:
        raise InputError("--workdir=DIR is missing: where checkpoints, metrics and events go")
    workdir = Path(WORKDIR.value).expanduser().absolute()
    claim(workdir, json.loads(config.to_json()), write=host == 0)
    startup.ends("model and data")
    from evit_jax.training.checkpoint import (
        Checkpoints,  # Orbax takes long to import; all above does not
    )

    checkpoints = Checkpoints(workdir / "checkpoints")
    startup.ends("checkpoints")
    first = checkpoints.latest or 0
    given = None
    if config.weights and not first:
        given = load_params(config.weights, model, key=key, new_head=config.new_head)
    log = recorder.Recorder(workdir, step=first, total=total, active=host == 0)

    # ---------------------------------------------------------------------------------- evaluation
    def test_batches():
        batches = pipeline.eval_batches(
            test_source, crop=card.crop, batch_size=config.run.test_batch_size, **view
        )
        return contextlib.closing(batches)

    def evaluate(model) -> dict[str, float]:
        params, sums = steps.eval_params(state), []
        with test_batches() as batches:
            for batch in batches:
                log.damaged(batch, test_source)
                jax.block_until_ready(sums[-1:])  # as in training, one batch ahead of the device
                sums.append(eval_step(model)(params, devices.put(batch)))
        return metrics.means(sums, "test")

    # ------------------------------------------------------------------------------------ training
    def completes(step: int, epochs: float) -> bool:
        return stages.completes(step, epochs * train_images / config.batch_size, total=total)

    def check(step: int, figures: dict[str, jax.Array], images: list[int]) -> None:
        """Awaits a step; raises InputError if its loss or gradients are not finite."""
        figures = {name: float(value) for name, value in figures.items()}
        if not all(map(math.isfinite, figures.values())):
            checkpoints.wait()
            raise broken(workdir, step, figures, images, checkpoints.latest, host)

    def place(batch: dict) -> tuple[dict, list[int]]:
        images = log.damaged(batch, train_source)
        return devices.put(batch), images

    # The first program and the first batch are made while the state is.
    programs = Programs(compile_stage)
    if first < total:
        programs.start(stages.stage_at(table, first, config.seed))
    batches = pipeline.train_batches(
        train_source,
        **config.augment,
        fill=card.fill,
        logits=teacher.logits,
        seed=config.seed,
        batch_size=config.batch_size,
        start=first,
        workers=config.run.workers,
        **view,
    )
    train_batches = Prefetch(batches, place)
    used, last, scores = set(), None, None
    with contextlib.closing(train_batches), contextlib.closing(programs):
        if first:
            state = checkpoints.restore(devices.placed(shapes[0]))
        elif given:
            state = devices.init(init, given)
        else:
            state = devices.init(draw, key)
        frozen = devices.init(dict, teacher.params)
        startup.ends("state")
        log.say(
            f"{report.count_of(state['params']):,} parameters, {train_images:,} training images, "
            f"{len(test_source):,} test images, {total:,} steps on {jax.device_count()} "
            f"{jax.default_backend()} device(s) of {hosts} process(es)"
        )
        if first:
            log.say(f"going on from the checkpoint of step {first:,} in {workdir}")

        clock = Clock()
        for step in range(first + 1, total + 1):
            if last and not train_batches.ready:
                check(*last)  # from here on the devices have nothing to do
            with clock.waiting():
                batch, images = next(train_batches)
            stage = stages.stage_at(table, step - 1, config.seed)
            if stage not in used:
                used.add(stage)
                with clock.paused():  # compiling is not training
                    log.say(
                        f"step {step}: {report.stage_line(model, stage)}, {programs.wait(stage)}"
                    )
                if not last:
                    startup.ends("compiling and first batch")
                for later in table:
                    if later.step >= stage.step:
                        programs.start(later)
            state, figures = programs[stage](state, batch, frozen)
            if not last:
                jax.block_until_ready(figures)
                startup.ends("first step")
                log.say(startup.line())
            clock.images += config.batch_size
            if last:
                check(*last)  # while this step runs; more of them would hide the wait for data
            last = step, figures, images
            log.bar.update()

            logging = step % config.run.log_every == 0 or step == total
            evaluating = completes(step, config.run.eval_every)
            stopping = stop.at(step) and step < total
            saving = completes(step, config.run.checkpoint_every) or stopping
            if not (logging or evaluating or saving):
                continue
            check(*last)
            at = dict(step=step, epoch=step * config.batch_size / train_images)
            if logging:
                means = metrics.means([state["metrics"]], "train")
                now = dict(lr=float(schedule(step - 1)), keep_rate=stage.keep_rate)
                now |= dict(grad_norm=float(figures["grad_norm"]))
                log.write(at | means | now | clock.read() | startup.figures())
                state["metrics"] = devices.init(metrics.zeros)
            with clock.paused():
                scores = None  # those of the last step are the result's
                if evaluating:
                    scores = evaluate(model)
                    log.write(at | scores)
                if saving:
                    checkpoints.save(step, state, scores)
            if stopping:
                checkpoints.wait()
                log.say(f"stopped after step {step}, and saved; run the same line again to go on")
                log.close()
                processes.leave(0)
        checkpoints.wait()

    # ------------------------------------------------ the result, beside the same weights run dense
    variants = stages.variants(model, config)
    with test_batches() as batches:
        batch = next(batches)
        log.damaged(batch, test_source)
        batch = devices.put(batch)
    params = steps.eval_params(state)
    seconds = timing.take_turns(
        {name: functools.partial(eval_step(variants[name]), params, batch) for name in variants},
        # Processes have to make the same calls.
        seconds=config.run.turn_seconds if hosts == 1 else 0,
    )
    rows = {
        name: dict(tokens=variant.tokens_per_block, macs=macs(variant))
        | (scores if scores and variant == model else evaluate(variant))
        | dict(images_per_second=(config.run.test_batch_size / seconds[name]).tolist())
        for name, variant in variants.items()
    }
    log.say("\n" + report.result_table(rows) + "\n")
    log.write(
        dict(step=total, epoch=config.epochs, final=True)
        | dict(keep_rate=min(config.sandwich, default=table[-1].keep_rate))
        | report.summary(rows)
    )
    log.close()


if __name__ == "__main__":
    cli.run(main)
