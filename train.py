# SPDX-License-Identifier: Apache-2.0
"""Trains a Vision Transformer whose blocks reduce their tokens.

python train.py --config=configs/NAME.py[:debug] --workdir=DIR [--config.FIELD=VALUE ...]

Rerun the same command to resume from the last checkpoint.
"""

import contextlib
import functools
import json

import jax
from absl import flags
from ml_collections import config_flags

from configs import common
from evit_jax import cli
from evit_jax.data.labels import PUBLISHED
from evit_jax.errors import InputError
from evit_jax.measure.timing import take_turns
from evit_jax.models import build_model, init_params, load_params, preprocessing
from evit_jax.plan import stages
from evit_jax.plan.counts import PLAN_FIELDS
from evit_jax.plan.flops import macs
from evit_jax.runtime import parallel, processes, topologies
from evit_jax.runtime.background import Prefetch
from evit_jax.spec import flatten
from evit_jax.storage import as_path
from evit_jax.training import dry_run, metrics, optim, report, steps
from evit_jax.training.clock import Clock, Startup
from evit_jax.training.evaluation import Evaluator
from evit_jax.training.labeling import TokenLabels
from evit_jax.training.mix import Mix
from evit_jax.training.progressive import check_factors, stage_models
from evit_jax.training.ranges import check_ranges
from evit_jax.training.recorder import Recorder
from evit_jax.training.run import (
    Calendar,
    Data,
    Profile,
    StagePrograms,
    Watch,
    check_sandwich,
    placed,
    use_plan_file,
)
from evit_jax.training.teachers import open_teacher
from evit_jax.training.workdir import open_workdir, pin_weights

CONFIG = config_flags.DEFINE_config_file("config", None, "a file in configs/", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "folder for checkpoints, metrics and events")
PROCESSES = flags.DEFINE_string(
    "processes", "", 'of one run: "auto" on TPU pods and Slurm, or HOST:PORT,COUNT,NUMBER'
)
PROFILE = flags.DEFINE_string("profile", "", "FIRST:LAST: trace these steps into WORKDIR/profile")
CHIPS = flags.DEFINE_string(
    "chips", "", "of a dry run: compile for these, such as v5e:4x4, which need not be there"
)
flags.mark_flag_as_required("config")


def main() -> None:
    # -------------------------------------------------------------- 1 configuration and processes
    startup = Startup()
    config = CONFIG.value
    check_ranges(flatten(config.to_dict()))
    use_plan_file(config)
    pin_weights(config, WORKDIR.value)
    if CHIPS.value and not config.dry_run:
        raise InputError("--chips is for dry runs; add --config.dry_run=True, or leave it out")
    processes.start_processes(PROCESSES.value)
    stop = processes.Stop()
    first_process = jax.process_index() == 0

    # ----------------------------------------------------------------- 2 devices, model, teacher
    # `model.keep` is the plan that is evaluated; the stages, in 4, are those that are trained.
    mix = Mix(**config.mix)
    devices = parallel.choose(
        config.run.parallel, shard_params=config.run.shard_params, chips=CHIPS.value
    )
    model = build_model(**config.model)
    check_sandwich(config, model)
    card = preprocessing(config.model.name)
    teacher = open_teacher(model, **config.distill)
    accumulate = config.run.accumulate or steps.micro_batches(
        model, config.batch_size, platform=devices.platform
    )
    mixed = dict(accumulate=accumulate, pairs=mix.pairs)
    devices.check_batch_size("batch_size", config.batch_size, **mixed)
    devices.check_batch_size("run.test_batch_size", config.run.test_batch_size)

    # --------------------------------------------------------------------------------- 3 the data
    # A dry run needs none: it shows epochs of a thousand steps.
    data = None if config.dry_run else Data(config, model, card, logits=teacher.logits)
    calendar = Calendar(config, images=len(data.train) if data else 1000 * config.batch_size)

    # ------------------------------------------- 4 the recipe: stages, optimizer, abstract state
    plan = {name: config.model[name] for name in PLAN_FIELDS}
    table = stages.open_table(
        model,
        plan,
        start=calendar.steps(config.keep_warmup.start_epoch),
        length=calendar.steps(config.keep_warmup.epochs),
        rungs=config.keep_warmup.rungs,
        rates=config.sandwich,
    )
    check_factors(model, **config.progressive, token_loss=config.distill.tokens)
    coarse_steps = calendar.steps(config.progressive.epochs)
    table = stages.coarse_first(table, config.progressive.factors, coarse_steps)
    labels = dict(config.labels)
    label_map = labels.pop("dir") and (data.maps.shape if data else PUBLISHED)
    settings = dict(config.optimizer)
    warmup_steps = calendar.steps(settings.pop("warmup_epochs"))
    backbone_start = calendar.steps(settings.pop("backbone_start_epoch"))
    optimizer, learning_rate = optim.create(
        **settings,
        warmup_steps=warmup_steps,
        backbone_start=backbone_start,
        total_steps=calendar.total,
    )
    recipe = steps.Recipe(
        preprocessing=card,
        optimizer=optimizer,
        mix=mix,
        seed=config.seed,
        label_smoothing=config.label_smoothing,
        loss=config.loss,
        labels=TokenLabels(**labels),
        ema_decay=config.ema_decay,
        accumulate=accumulate,
        **teacher.recipe,
    )
    key = jax.random.key(config.seed)
    init = functools.partial(steps.init_state, optimizer=optimizer, ema=config.ema_decay > 0)
    teacher_classes = model.num_classes * (teacher.logits is not None)
    shapes = (
        jax.eval_shape(lambda key: init(init_params(model, key)), key),
        steps.batch_shapes(model.image_size, config.batch_size, teacher_classes, label_map),
        teacher.params,
    )

    def compile_stage(stage: stages.Stage):
        models = stage_models(model, stage)
        step = functools.partial(steps.train_step, models=models, recipe=recipe)
        return devices.compile_train(step, *shapes)

    # ---------------------------------------------------------------------------------- 5 dry run
    if config.dry_run:
        print(report.parameter_table(shapes[0]["params"]), end="\n\n")
        print(report.stage_table(model, table, steps_per_epoch=1000), end="\n\n")
        print("compiling the training step; nothing is run ...", end="\n\n", flush=True)
        compiled = compile_stage(next(stage for stage in table if stage.coarse == 1))
        memory = topologies.chip_of(CHIPS.value).memory_bytes if CHIPS.value else None
        print(dry_run.step_tables(*shapes[:2], compiled, devices, memory=memory))
        return

    # -------------------------------------------------------- 6 the workdir, checkpoints, recorder
    if config.new_head and not config.weights:
        raise InputError("new_head is for --config.weights=FILE; without them all is initialized")
    if not WORKDIR.value:
        raise InputError("--workdir=DIR is missing: where checkpoints, metrics and events go")
    workdir = as_path(WORKDIR.value)
    profile = Profile(PROFILE.value, workdir)
    fields, defaults = (json.loads(c.to_json()) for c in (config, common.get_config()))
    open_workdir(workdir, fields, defaults=defaults, write=first_process)
    startup.mark("model and data")
    from evit_jax.training.checkpoint import Checkpoints  # Orbax takes long to import

    checkpoints = Checkpoints(workdir / "checkpoints")
    startup.mark("checkpoints")
    first = checkpoints.latest or 0
    log = Recorder(
        workdir, step=first, total=calendar.total, active=first_process, train=data.train
    )
    see_test = functools.partial(log.see, source=data.test)
    evaluate = Evaluator(devices, card, data.test_batches, see_test)

    # ---------------------------------------------------------------------------------- 7 the state
    # A workdir belongs to one recipe. Its newest complete checkpoint is the state, wherever it was
    # saved; without one it is made of config.weights, and without those of random weights. Data,
    # augmentation and dropout are functions of seed and step alone, so a checkpoint needs nothing
    # else. The first batch and the first program are made in the background meanwhile. Batches come
    # first: what they import must not meet another thread (`loader.prepare`).
    weights = None
    if config.weights and not first:
        weights = load_params(config.weights, model, key=key, new_head=config.new_head)
    batches = Prefetch(data.train_batches(first), functools.partial(placed, devices=devices))
    programs = StagePrograms(compile_stage, table, config.seed)
    if first < calendar.total:
        programs.start(first + 1)
    with contextlib.closing(batches), contextlib.closing(programs):
        if first:
            state = checkpoints.restore(devices.placed(shapes[0]))
        elif weights:
            state = devices.init(init, weights)
        else:
            state = devices.init(lambda key: init(init_params(model, key)), key)
        frozen = devices.init(dict, teacher.params)
        startup.mark("state")
        log.say(report.size_line(state["params"], len(data.train), len(data.test), calendar.total))
        clock = Clock()
        watch = Watch(workdir, model, batches, checkpoints, log, clock, startup)
        scores = None  # those of the last step, if it was evaluated
        if first:
            log.say(f"resuming from the checkpoint of step {first:,} in {workdir}")
            if calendar.due(first, stop=False).evaluate and not checkpoints.has_scores(first):
                scores = evaluate(model, state)  # it was interrupted
                log.write(calendar.at(first) | scores | log.count_damaged())

        # ------------------------------------------------------------------------------ 8 training
        # Do not reorder: a step is checked while the next one runs.
        for step in range(first + 1, calendar.total + 1):
            batch = watch.next_batch()
            profile.before(step)
            state, figures = programs.at(step, watch)(state, batch, frozen)
            watch.step_taken(step, figures, config.batch_size)
            profile.after(step, figures, log)
            due, scores = calendar.due(step, stop=stop.now()), None
            if not any(due):
                continue
            watch.check_previous()
            if due.log:
                now = metrics.means([state["metrics"]], "train")
                now |= dict(lr=float(learning_rate(step - 1)))
                now |= dict(keep_rate=programs.stage(step).keep_rate)
                now |= dict(grad_norm=float(figures["grad_norm"])) | log.count_damaged()
                log.write(calendar.at(step) | now | clock.read() | startup.figures())
                state["metrics"] = devices.init(metrics.zeros)
            with clock.paused():
                stopping = due.stop
                if due.evaluate and not stopping:
                    scores = evaluate(model, state, interrupted=stop.now)
                    stopping = scores is None
                    if scores:
                        log.write(calendar.at(step) | scores | log.count_damaged())
                if due.save or stopping:
                    checkpoints.save(step, state, scores)
            if stopping:
                checkpoints.wait()
                log.say(f"stopped after step {step}, and saved; rerun the same command to resume")
                log.close()
                processes.leave(0)
        checkpoints.wait()

    # --------------------------------------------- 9 the result, beside the same weights run dense
    variants = stages.variants(model, plan, config.sandwich)
    params, batch = steps.eval_params(state), evaluate.one_batch()
    seconds = take_turns(
        {
            name: functools.partial(evaluate.program(variant), params, batch)
            for name, variant in variants.items()
        },
        # Processes have to make the same calls.
        seconds=config.run.turn_seconds if jax.process_count() == 1 else 0,
    )
    rows = {}
    for name, variant in variants.items():
        final = scores if variant == model else None
        final = final or evaluate(variant, state, interrupted=stop.now)
        if final is None:
            log.say("stopped before the result; rerun the same command for it")
            log.close()
            processes.leave(0)
        speed = dict(images_per_second=(config.run.test_batch_size / seconds[name]).tolist())
        rows[name] = dict(tokens=variant.tokens_per_block, macs=macs(variant)) | final | speed
    log.say("\n" + report.result_table(rows) + "\n")
    rate = dict(keep_rate=min(config.sandwich, default=table[-1].keep_rate))
    log.write(calendar.at(calendar.total) | dict(final=True) | rate | report.summary(rows))
    log.say(report.what_next(workdir, model.reducer))
    log.close()


if __name__ == "__main__":
    cli.run(main)
