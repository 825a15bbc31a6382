# SPDX-License-Identifier: Apache-2.0
"""Trains a Vision Transformer whose blocks reduce their tokens.

python train.py --config=configs/NAME.py[:debug] --workdir=DIR [--config.FIELD=VALUE ...]

Run the same line again to go on from the last checkpoint.
"""

import contextlib
import functools
import json
import math
import time
from pathlib import Path

import jax
from absl import flags
from ml_collections import config_flags

from evit_jax import cli, metrics, optim, plan, recorder, report, steps, timing
from evit_jax.checkpoint import Checkpoints
from evit_jax.data import open_source, pipeline
from evit_jax.errors import InputError
from evit_jax.flops import macs
from evit_jax.models import build_model, init_params, preprocessing
from evit_jax.parallel import DataParallel
from evit_jax.ranges import check_ranges

CONFIG = config_flags.DEFINE_config_file("config", None, "a file in configs/", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "folder for checkpoints, metrics and events")
flags.mark_flag_as_required("config")


def main() -> None:
    config = CONFIG.value
    check_ranges(recorder.flatten(config.to_dict()))
    host, hosts = jax.process_index(), jax.process_count()

    # ------------------------------------------------------------------------------ devices, model
    devices = DataParallel()
    devices.check_batch_size(config.batch_size)
    devices.check_batch_size(config.run.test_batch_size)
    model = build_model(**config.model)
    dense = model.clone(keep=())
    card = preprocessing(config.model.name)

    # ---------------------------------------------------------------------------------------- data
    view = dict(size=model.image_size, interpolation=card.interpolation)
    view |= dict(host=host, hosts=hosts, threads=config.run.threads)
    train_images = 1000 * config.batch_size  # a dry run needs no data; epochs are what it shows
    if not config.dry_run:
        train_source = open_source(config.data.name, "train", config.data.dir)
        test_source = open_source(config.data.name, "test", config.data.dir)
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
    rates = {name: config.model[name] for name in ("keep_rate", "layers", "keep_rates", "tokens")}
    by_rate = rates["keep_rates"] or rates["keep_rate"] or not any(model.keep)  # else by counts
    stages = plan.stages(
        lambda left: model.plan(**rates, left=left),
        min(rates["keep_rates"] or [rates["keep_rate"] or 1.0]) if by_rate else None,
        start=to_steps(config.keep_warmup.start_epoch),
        length=to_steps(config.keep_warmup.epochs),
        rungs=config.keep_warmup.rungs,
    )
    settings = dict(config.optimizer)
    warmup_steps = to_steps(settings.pop("warmup_epochs"))
    optimizer, schedule = optim.create(**settings, warmup_steps=warmup_steps, total_steps=total)

    @functools.cache
    def train_step(keep: plan.Keep):  # one compiled program per stage
        step = functools.partial(
            steps.train_step,
            model=model.clone(keep=keep),
            optimizer=optimizer,
            preprocessing=card,
            label_smoothing=config.label_smoothing,
            ema_decay=config.ema_decay,
            seed=config.seed,
        )
        return devices.compile_train(step)

    @functools.cache
    def eval_step(model):
        return devices.compile_eval(
            functools.partial(steps.eval_step, model=model, preprocessing=card)
        )

    def init(key: jax.Array) -> steps.State:
        return steps.init_state(init_params(model, key), optimizer, ema=config.ema_decay > 0)

    key = jax.random.key(config.seed)
    if config.dry_run:
        state = jax.eval_shape(init, key)
        batch = steps.batch_shapes(model.image_size, config.batch_size)
        print(report.parameter_table(state["params"]), end="\n\n")
        print(report.stage_table(model, stages, steps_per_epoch=1000), end="\n\n")
        print("compiling the training step; nothing is run ...", end="\n\n", flush=True)
        compiled = train_step(stages[0].keep).lower(state, batch).compile()
        print(report.memory_table(state, batch, compiled, jax.device_count()))
        return

    # ---------------------------------------------------------------------------- state, or resume
    # A workdir belongs to one recipe. Its newest complete checkpoint is the state; without one the
    # run starts afresh. Data, augmentation and dropout are functions of seed and step alone, so the
    # checkpoint needs nothing else.
    if not WORKDIR.value:
        raise InputError("--workdir=DIR is missing: where checkpoints, metrics and events go")
    workdir = Path(WORKDIR.value).expanduser().absolute()
    if host == 0:
        recorder.claim(workdir, json.loads(config.to_json()))
    checkpoints = Checkpoints(workdir / "checkpoints")
    state = devices.init(init, key)
    if checkpoints.latest is not None:
        state = checkpoints.restore(state)
    first = int(state["step"])
    log = recorder.Recorder(workdir, step=first, total=total, active=host == 0)
    log.say(
        f"{report.count_of(state['params']):,} parameters, {train_images:,} training images, "
        f"{len(test_source):,} test images, {total:,} steps on {jax.device_count()} "
        f"{jax.default_backend()} device(s)"
    )
    if first:
        log.say(f"going on from the checkpoint of step {first:,} in {workdir}")

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
                jax.block_until_ready(sums[-1:])  # as in training, one batch ahead of the device
                sums.append(eval_step(model)(params, devices.put(batch)))
        return metrics.means(sums, "test")

    # ------------------------------------------------------------------------------------ training
    def completes(step: int, epochs: float) -> bool:
        """Whether this step ends a stretch of so many epochs, or the run."""
        every = epochs * train_images / config.batch_size  # steps, not always a whole number
        return step == total or (every > 0 and step // every > (step - 1) // every)

    train_batches = pipeline.train_batches(
        train_source,
        **config.augment,
        seed=config.seed,
        batch_size=config.batch_size,
        start=first,
        **view,
    )
    stage, last_loss, scores, clock = None, 0.0, None, timing.Clock()
    with contextlib.closing(train_batches):
        for step in range(first + 1, total + 1):
            with clock.waiting():
                batch = devices.put(next(train_batches))
            previous, stage = stage, plan.stage_at(stages, step - 1)
            if stage is previous:
                state, loss = train_step(stage.keep)(state, batch)
                clock.images += config.batch_size
            else:
                with clock.paused():  # compiling is not training
                    started = time.perf_counter()
                    state, loss = jax.block_until_ready(train_step(stage.keep)(state, batch))
                    seconds = time.perf_counter() - started
                    tokens = report.runs(model.clone(keep=stage.keep).tokens_per_block)
                    log.say(f"step {step}: tokens {tokens}, compiled in {seconds:.1f} s")
            # One step runs while the next batch is fetched. More would hide the wait for data.
            jax.block_until_ready(last_loss)
            last_loss = loss
            log.bar.update()

            logging = step % config.run.log_every == 0 or step == total
            evaluating = completes(step, config.run.eval_every)
            saving = completes(step, config.run.checkpoint_every)
            if not (logging or evaluating or saving):
                continue
            if not math.isfinite(loss):
                raise InputError(
                    f"the loss is {float(loss)} at step {step} (latest checkpoint: step "
                    f"{checkpoints.latest}); start again in another workdir with a lower "
                    "--config.optimizer.lr or with --config.optimizer.clip_norm=1"
                )
            figures = dict(step=step, epoch=step * config.batch_size / train_images)
            if logging:
                means = metrics.means([state["metrics"]], "train")
                now = dict(lr=float(schedule(step - 1)), keep_rate=stage.keep_rate)
                log.write(figures | means | now | clock.read())
                state["metrics"] = devices.init(metrics.zeros)
            with clock.paused():
                scores = None  # those of the last step are the result's
                if evaluating:
                    scores = evaluate(model)
                    log.write(figures | scores)
                if saving:
                    checkpoints.save(step, state, scores)
        checkpoints.wait()

    # ------------------------------------------------ the result, beside the same weights run dense
    variants = {"dense": dense}
    if any(keep is not None for keep in model.keep):
        variants = {"reduced": model, "dense": dense}
    with test_batches() as batches:
        batch = devices.put(next(batches))
    params = steps.eval_params(state)
    seconds = timing.take_turns(
        {name: functools.partial(eval_step(variants[name]), params, batch) for name in variants}
    )
    rows = {
        name: dict(tokens=variant.tokens_per_block, macs=macs(variant))
        | (scores if scores and variant is model else evaluate(variant))
        | dict(images_per_second=(config.run.test_batch_size / seconds[name]).tolist())
        for name, variant in variants.items()
    }
    log.say("\n" + report.result_table(rows) + "\n")
    log.write(
        dict(step=total, epoch=config.epochs, final=True, keep_rate=stages[-1].keep_rate)
        | report.summary(rows)
    )
    log.close()


if __name__ == "__main__":
    cli.run(main)
