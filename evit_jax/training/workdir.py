# SPDX-License-Identifier: Apache-2.0
"""A run's folder: whose it is, and what stays in it when a run breaks.

config.json        the recipe; another recipe is refused
broken_batch.json  only after a loss that was not finite: its step and its images
"""

import contextlib
import json
from pathlib import Path

from evit_jax.errors import InputError
from evit_jax.spec import flatten
from evit_jax.storage import as_path, explained, write_whole
from evit_jax.weights import hub

# What may differ when a run is resumed: it changes where things are and how fast, and how often
# something is shown; of the result only rounding.
FREE = ("run.", "data.dir", "data.cache", "model.remat", "dry_run")


def open_workdir(
    workdir: Path, config: dict, *, defaults: dict | None = None, write: bool = True
) -> None:
    """Makes `workdir` the folder of the run with this recipe, or checks that it is.

    Of several processes one does the writing; all of them check.

    Args:
      config: the recipe, as nested dicts.
      defaults: a field that an older version did not know had this value then, so that at its
        default a new field is not another recipe.

    Raises:
      InputError: it belongs to a run with another recipe; the text shows the difference.
    """
    with explained(workdir):
        path = workdir / "config.json"
        if write:
            workdir.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            if not write:
                return
            if (workdir / "checkpoints").exists():
                raise InputError(
                    f"{workdir} has checkpoints but no config.json; use another workdir"
                )
            write_whole(path, json.dumps(config, indent=2) + "\n")
            return
        try:
            there = flatten(json.loads(path.read_text()))
        except ValueError:
            raise InputError(
                f"{path} is damaged; use another workdir, or remove that file"
            ) from None
        here = flatten(json.loads(json.dumps(config)))
        before = flatten(json.loads(json.dumps(defaults or {})))
        there = {key: value for key, value in before.items() if key in here} | there
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


def pin_weights(config, workdir: str | None) -> None:
    """Gives weights of the hub that are named without a commit the one that they have.

    So the run's own record says which they were. A run that is resumed keeps those it began with,
    whatever their names mean by now, and asks nobody.

    Raises:
      InputError: the hub cannot be reached, see `weights.hub.download`.
    """
    for holder, begun in ((config, ()), (config.distill, ("distill",))):
        if not holder.weights.startswith("hf:"):
            continue
        before = recorded(workdir, *begun, "weights")
        kept = hub.pins(holder.weights, before)
        holder.weights = before if kept else hub.pinned(holder.weights)


def recorded(workdir: str | None, *keys: str) -> str:
    """A field of the run's config.json; "" where there is none."""
    try:
        field = json.loads((as_path(workdir or "") / "config.json").read_text())
        for key in keys:
            field = field[key]
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    return str(field)


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
    with contextlib.suppress(OSError, InputError):  # a full disk must not hide the message
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
