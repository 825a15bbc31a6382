# SPDX-License-Identifier: Apache-2.0
"""The only file that knows Orbax: checkpoints of the training state, the latest and the best."""

import contextlib
import logging
import re
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp

from evit_jax.errors import InputError
from evit_jax.storage import as_path, explained

policies = ocp.checkpoint_managers.preservation_policy


def top1(metrics: dict) -> float:
    return metrics["test_top1"]


def silence_tensorstore(unraisable, otherwise=sys.unraisablehook) -> None:
    """An unraisablehook without TensorStore's noise after a failed save.

    What is left of that save reports to an event loop which Orbax has closed by then, a traceback
    for every array, all around the one error that says what happened.
    """
    if str(unraisable.exc_value) != "Event loop is closed":
        otherwise(unraisable)


def drop_orbax_logs(record: logging.LogRecord) -> bool:
    """A log filter: Orbax logs every part of a save, and what it raises once more as tracebacks.

    asyncio does the same for the other arrays of a failed save, whose folder has Orbax's name.
    """
    return "orbax" not in record.pathname + record.getMessage()


class Checkpoints:
    """Numbered checkpoints under a folder. Saving runs in the background; a save is all or nothing.

    A step's folder appears under its final name only when it is complete, so whatever kills the
    process, the last finished checkpoint stays intact.
    """

    def __init__(self, folder: str, *, read_only: bool = False):
        """Opens or makes the folder; `read_only` leaves a run that is writing there alone."""
        self.folder = as_path(folder)
        with explained(self.folder):
            if read_only and not self.folder.is_dir():
                raise InputError(f"{self.folder} does not exist")
        sys.unraisablehook = silence_tensorstore
        for name in ("absl", "asyncio"):
            logging.getLogger(name).addFilter(drop_orbax_logs)
        # Without a policy for both, the best checkpoints would push out the latest one.
        keep = policies.AnyPreservationPolicy(
            [
                policies.LatestN(1),
                policies.BestN(get_metric_fn=top1, n=1, keep_checkpoints_without_metrics=False),
            ]
        )
        options = ocp.CheckpointManagerOptions(
            best_fn=top1,
            preservation_policy=keep,
            cleanup_tmp_directories=not read_only,
            create=not read_only,
            read_only=read_only,
        )
        with explained(self.folder):
            self.manager = ocp.CheckpointManager(self.folder, options=options)

    @property
    def latest(self) -> int | None:
        """The step of the newest complete checkpoint."""
        return self.manager.latest_step()

    def has_scores(self, step: int) -> bool:
        """Whether this step's checkpoint was saved with an evaluation."""
        with explained(self.folder):
            return (self.folder / str(step) / "metrics").exists()

    def save(self, step: int, state: dict, metrics: dict[str, float] | None = None) -> None:
        """Starts to save; the state may be changed or donated as soon as this returns.

        Raises:
          InputError: this save, or the one before it, could not be written.
        """
        try:
            args = ocp.args.Composite(state=ocp.args.StandardSave(state))
            self.manager.save(step, args=args, metrics=metrics)
        except Exception as error:  # Orbax and TensorStore raise many kinds
            raise self.failed(error) from error

    def restore(self, like: dict) -> dict:
        """The newest checkpoint, with the structure, dtypes and placement of `like`."""
        like = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), like
        )
        args = ocp.args.Composite(state=ocp.args.StandardRestore(like))
        with explained(self.folder):
            return self.manager.restore(self.latest, args=args)["state"]

    def load(self) -> dict:
        """The newest checkpoint as nested dicts of NumPy arrays, without knowing its structure.

        Raises:
          InputError: there is none.
        """
        if self.latest is None:
            raise InputError(f"{self.folder} has no complete checkpoint")
        folder, checkpointer = self.folder / str(self.latest) / "state", ocp.PyTreeCheckpointer()
        with explained(self.folder):
            item = checkpointer.metadata(folder).item_metadata.tree
            numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
            return checkpointer.restore(folder, restore_args=numpy)

    def wait(self) -> None:
        """Returns when everything is on disk; raises InputError if it could not be."""
        try:
            self.manager.wait_until_finished()
        except Exception as error:
            raise self.failed(error) from error

    def failed(self, error: Exception) -> InputError:
        """What the user has to know when a save fails."""
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        system = re.search(r"([^:]+) \[os_error_code", reason)  # within TensorStore's own words
        reason = system[1].strip() if system else reason
        with contextlib.suppress(Exception):  # a bucket may be out of reach for this as well
            self.manager.reload()
        kept = "no checkpoint is complete yet"
        if self.latest is not None:
            kept = f"the checkpoint of step {self.latest} is complete"
        return InputError(
            f"could not save to {self.folder} ({reason}); {kept}; "
            "make room or permission there and rerun the same command to resume"
        )
