# SPDX-License-Identifier: Apache-2.0
"""A run's folder beside its checkpoints: config.json, metrics.jsonl, TensorBoard events, log lines.

config.json    the recipe; another recipe is refused
metrics.jsonl  one JSON object per log line and evaluation
broken_batch.json  only after a loss that was not finite: its step and its images
tensorboard/   the same scalars, where the extra `tensorboard` is installed
"""

import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
from tqdm import tqdm

from evit_jax.storage import Lines, explained, in_bucket, upload
from evit_jax.training import report


class Recorder:
    """Writes a run's figures where people and programs look for them.

    Args:
      workdir: the run's folder.
      step: the step the run continues from; lines of later steps are dropped, since these steps
        are taken again, and so is a final line.
      total: the run's last step, for the progress bar (only on a terminal).
      active: False on all processes but the first.
      train: the training images, whose names `see` says.
    """

    def __init__(self, workdir: Path, *, step: int, total: int, active: bool = True, train=None):
        self.active, self.total = active, total
        self.bar = tqdm(
            total=total, initial=step, unit="step", leave=False, disable=None if active else True
        )
        self.train, self.board, self.skipped, self.damaged = train, None, set(), 0
        if not active:
            return
        path = workdir / "metrics.jsonl"
        with explained(path):
            before = path.read_text().splitlines() if path.exists() else []
        self.lines = Lines(path, [line for line in before if kept(line, step)])
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            return
        self.events = workdir / "tensorboard"
        self.local_events = self.events
        if in_bucket(workdir):  # where nothing can be appended to: uploaded whole with every line
            self.local_events = Path(tempfile.mkdtemp(prefix="evit_jax_events_"))
        self.board = SummaryWriter(str(self.local_events), purge_step=step + 1)

    def say(self, text: str) -> None:
        """One line for people, above the progress bar."""
        if self.active:
            tqdm.write(text)

    def see(self, host: dict[str, np.ndarray], source=None) -> None:
        """Counts the damaged images of a batch for the next line, and names the new ones.

        Args:
          host: what stays on the host of a batch, see `pipeline.split_host_arrays`.
          source: what its indices count; default the training images.
        """
        source = self.train if source is None else source
        damaged = host["index"][host["damaged"]].tolist()
        self.damaged += len(damaged)
        for name in {source[number]["name"] for number in damaged} - self.skipped:
            self.skipped.add(name)  # also on other processes, which have images of their own
            tqdm.write(f"skipped damaged image {len(self.skipped)}: {name}")

    def count_damaged(self) -> dict[str, int]:
        """`damaged_images` of this process since the last call, nothing where there were none."""
        count, self.damaged = self.damaged, 0
        return dict(damaged_images=count) if count else {}

    def write(self, figures: dict) -> None:
        """Figures, `step` and `epoch` among them: a JSON line, TensorBoard scalars, a log line."""
        if not self.active:
            return
        self.lines.append(json.dumps(figures))
        if self.board:
            for name, value in figures.items():
                if type(value) in (int, float) and name != "step":
                    self.board.add_scalar(name, value, figures["step"])
            if self.local_events != self.events:
                self.board.flush()
                upload(self.local_events, self.events)
        self.say(report.line(figures, self.total))

    def close(self) -> None:
        self.bar.close()
        if self.active:
            self.lines.close()
        if self.board:
            self.board.close()
            if self.local_events != self.events:
                upload(self.local_events, self.events)
                shutil.rmtree(self.local_events)


def kept(line: str, step: int) -> bool:
    """Whether a line of metrics.jsonl stays when the run continues from `step`."""
    try:
        figures = json.loads(line)
    except ValueError:  # cut off in the middle
        return False
    return figures["step"] <= step and not figures.get("final", False)
