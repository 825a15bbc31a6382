# SPDX-License-Identifier: Apache-2.0
"""A run's folder beside its checkpoints: config.json, metrics.jsonl, TensorBoard events, log lines.

config.json    the recipe; another recipe is refused
metrics.jsonl  one JSON object per log line and evaluation
broken_batch.json  only after a loss that was not finite: its step and its images
tensorboard/   the same scalars, where the extra `tensorboard` is installed
"""

import contextlib
import json
import os
from pathlib import Path

from tqdm import tqdm

from evit_jax import report
from evit_jax.errors import InputError

# What may differ when a run is resumed: it changes where things are and how fast, and how often
# something is shown; of the result only rounding.
FREE = ("run.", "data.dir", "data.cache", "model.remat", "dry_run")


def flatten(tree: dict, prefix: str = "") -> dict:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat = {}
    for key, value in tree.items():
        nested = isinstance(value, dict)
        flat |= flatten(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return flat


def claim(workdir: Path, config: dict, *, write: bool = True) -> None:
    """Makes `workdir` the folder of the run with this recipe, or checks that it is.

    Of several processes one does the writing; all of them check.

    Raises:
      InputError: it belongs to a run with another recipe; the text shows the difference.
    """
    path = workdir / "config.json"
    if write:
        workdir.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        if not write:
            return
        if (workdir / "checkpoints").exists():
            raise InputError(f"{workdir} has checkpoints but no config.json; use another workdir")
        write_whole(path, json.dumps(config, indent=2) + "\n")
        return
    try:
        there = flatten(json.loads(path.read_text()))
    except ValueError:
        raise InputError(f"{path} is damaged; use another workdir, or remove that file") from None
    here = flatten(json.loads(json.dumps(config)))
    differences = [
        f"{key} is {there.get(key)!r} there and {here.get(key)!r} here"
        for key in sorted(there | here)
        if there.get(key) != here.get(key) and not key.startswith(FREE)
    ]
    if not any(saved.name.isdigit() for saved in (workdir / "checkpoints").glob("*")):
        if write:  # nothing to lose yet
            write_whole(path, json.dumps(config, indent=2) + "\n")
    elif differences:
        raise InputError(
            f"{workdir} belongs to a run with another configuration: {'; '.join(differences)}; "
            "use another --workdir, or the same settings to resume"
        )


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file that is never seen half written, whatever kills the process."""
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def broken(
    workdir: Path,
    step: int,
    figures: dict[str, float],
    indices: list[int],
    latest: int | None,
    host: int = 0,
) -> InputError:
    """What to tell the user, and to keep in the workdir, when a step's figures are not finite.

    Args:
      host: this process's number; each keeps its own images.
      indices: places of the step's images in the training data, of this process.
      latest: step of the latest checkpoint.
    """
    path = workdir / (f"broken_batch_{host}.json" if host else "broken_batch.json")
    with contextlib.suppress(OSError):  # a full disk must not hide the message
        write_whole(path, json.dumps(dict(step=step, indices=indices)) + "\n")
    shown = ", ".join(map(str, indices[:8])) + (", ..." if len(indices) > 8 else "")
    kept = "there is no checkpoint yet"
    if latest is not None:
        kept = f"the last good checkpoint is that of step {latest}"
    said = ", ".join(f"{name} {value}" for name, value in figures.items())
    return InputError(
        f"step {step} is not finite ({said}); {kept}; its images are number {shown} of the "
        f"training data (all of them in {path}); start again in another workdir with a lower "
        "--config.optimizer.lr or with --config.optimizer.clip_norm=1"
    )


class Recorder:
    """Writes a run's figures where people and programs look for them.

    Args:
      workdir: the run's folder.
      step: the step the run continues from; lines of later steps are dropped, since these steps
        are taken again, and so is a final line.
      total: the run's last step, for the progress bar (only on a terminal).
      active: False on all processes but the first.
    """

    def __init__(self, workdir: Path, *, step: int, total: int, active: bool = True):
        self.active, self.total = active, total
        self.bar = tqdm(
            total=total, initial=step, unit="step", leave=False, disable=None if active else True
        )
        self.board, self.skipped = None, set()
        if not active:
            return
        path = workdir / "metrics.jsonl"
        if path.exists():
            lines = [line for line in path.read_text().splitlines() if kept(line, step)]
            write_whole(path, "".join(line + "\n" for line in lines))
        self.file = open(path, "a")  # noqa: SIM115  lives as long as the run
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            return
        self.board = SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1)

    def say(self, text: str) -> None:
        """One line for people, above the progress bar."""
        if self.active:
            tqdm.write(text)

    def damaged(self, batch: dict, source) -> list[int]:
        """Takes `index` and `damaged` out of a host batch; names images skipped for the first time.

        Returns the places of the batch's images in the source.
        """
        index, damaged = batch.pop("index"), batch.pop("damaged")
        for name in {source[number]["name"] for number in index[damaged].tolist()} - self.skipped:
            self.skipped.add(name)  # also on other processes, which have images of their own
            tqdm.write(f"skipped damaged image {len(self.skipped)}: {name}")
        return index.tolist()

    def write(self, figures: dict) -> None:
        """Figures, `step` and `epoch` among them: a JSON line, TensorBoard scalars, a log line."""
        if not self.active:
            return
        self.file.write(json.dumps(figures) + "\n")
        self.file.flush()
        if self.board:
            for name, value in figures.items():
                if type(value) in (int, float) and name != "step":
                    self.board.add_scalar(name, value, figures["step"])
        self.say(report.line(figures, self.total))

    def close(self) -> None:
        self.bar.close()
        if self.active:
            self.file.close()
        if self.board:
            self.board.close()


def kept(line: str, step: int) -> bool:
    """Whether a line of metrics.jsonl stays when the run continues from `step`."""
    try:
        figures = json.loads(line)
    except ValueError:  # cut off in the middle
        return False
    return figures["step"] <= step and not figures.get("final", False)
