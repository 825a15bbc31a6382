# SPDX-License-Identifier: Apache-2.0
"""One pass over the test images, for several programs at once: of train.py and of the tools."""

import contextlib
import functools
from collections.abc import Callable, Iterator

import jax

from evit_jax.data.pipeline import split_host_arrays
from evit_jax.models.card import Preprocessing
from evit_jax.runtime.parallel import DataParallel
from evit_jax.training import metrics, steps


def run_through(
    batches: Iterator[dict],
    programs: dict[str, Callable[[dict], dict]],
    devices: DataParallel,
    *,
    see: Callable[[dict], object] = lambda host: None,
    interrupted: Callable[[], bool] = lambda: False,
) -> dict[str, dict[str, float]] | None:
    """Runs every program on every batch and divides their sums once.

    Args:
      batches: of `pipeline.eval_batches`; closed at the end.
      programs: name -> (batch on the devices) -> sums as of `metrics.sums`.
      devices: where the batches go.
      see: is handed what stays on the host of each batch, see `pipeline.split_host_arrays`.
      interrupted: asked before every batch; the same answer in all processes.

    Returns:
      name -> test_loss, test_top1, test_top5 over all images, or None if it was interrupted.
    """
    sums = {name: [] for name in programs}
    with contextlib.closing(batches):
        for batch in batches:
            if interrupted():
                return None
            batch, host = split_host_arrays(batch)
            see(host)
            batch = devices.put(batch)
            for name, program in programs.items():
                jax.block_until_ready(sums[name][-1:])  # one batch ahead of the device, no more
                sums[name].append(program(batch))
    return {name: metrics.means(totals, "test") for name, totals in sums.items()}


class Evaluator:
    """Evaluates a run's models during training."""

    def __init__(
        self,
        devices: DataParallel,
        card: Preprocessing,
        batches: Callable[[], Iterator[dict]],
        see: Callable[[dict], object],
    ):
        """Args as for `run_through`; `batches` opens a pass."""
        self.devices, self.card, self.batches, self.see = devices, card, batches, see

    @functools.cache  # noqa: B019  an evaluator lives as long as the run
    def program(self, model) -> Callable[[dict, dict], dict]:
        """(params, batch) -> sums, compiled at its first call."""
        step = functools.partial(steps.eval_step, model=model, preprocessing=self.card)
        return self.devices.compile_eval(step)

    def __call__(
        self, model, state: steps.State, *, interrupted: Callable[[], bool] = lambda: False
    ) -> dict[str, float] | None:
        """The model's scores with a state's parameters, None if it was interrupted.

        Where the state has an average of the weights, test_* are the average's and weights_test_*
        those of the weights themselves, which the paper's code reports.
        """
        params = dict(average=steps.eval_params(state))
        if "ema" in state:
            params["weights"] = state["params"]
        program = self.program(model)
        programs = {name: functools.partial(program, tree) for name, tree in params.items()}
        scores = run_through(
            self.batches(), programs, self.devices, see=self.see, interrupted=interrupted
        )
        if scores is None:
            return None
        own = {f"weights_{name}": value for name, value in scores.get("weights", {}).items()}
        return scores["average"] | own

    def one_batch(self) -> dict:
        """The first test batch, on the devices."""
        with contextlib.closing(self.batches()) as batches:
            return self.devices.put(split_host_arrays(next(batches))[0])
