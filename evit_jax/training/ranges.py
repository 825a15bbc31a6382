# SPDX-License-Identifier: Apache-2.0
"""Which values the numbers of a configuration may have."""

import math
import sys
from collections.abc import Mapping

from evit_jax.errors import InputError

POSITIVE = math.ulp(0.0)  # the smallest number above zero
LARGEST = sys.float_info.max  # anything but infinity
BELOW_ONE = math.nextafter(1.0, 0.0)

RANGES = {
    "seed": (0, 2**31 - 1),
    "epochs": (POSITIVE, LARGEST),
    "label_smoothing": (0, BELOW_ONE),
    "ema_decay": (0, BELOW_ONE),
    "keep_warmup.start_epoch": (0, LARGEST),
    "keep_warmup.epochs": (0, LARGEST),
    "keep_warmup.rungs": (1, 1000),
    "progressive.epochs": (0, LARGEST),
    "optimizer.lr": (0, LARGEST),
    "optimizer.warmup_lr": (0, LARGEST),
    "optimizer.warmup_epochs": (0, LARGEST),
    "optimizer.min_lr": (0, LARGEST),
    "optimizer.weight_decay": (0, LARGEST),
    "optimizer.clip_norm": (0, LARGEST),
    "optimizer.backbone_lr": (0, LARGEST),
    "optimizer.backbone_start_epoch": (0, LARGEST),
    "optimizer.b1": (0, BELOW_ONE),
    "optimizer.b2": (0, BELOW_ONE),
    "distill.tokens": (0, LARGEST),
    "augment.scale": (POSITIVE, 1),
    "augment.ratio": (POSITIVE, LARGEST),
    "augment.randaugment_magnitude": (0, 10),
    "augment.randaugment_std": (0, LARGEST),
    "augment.randaugment_layers": (0, 15),
    "augment.color_jitter": (0, 1),
    "augment.repeats": (1, 100),
    "mix.erasing": (0, 1),
    "mix.mixup": (0, LARGEST),
    "mix.cutmix": (0, LARGEST),
    "mix.switch": (0, 1),
    "mix.token": (0, LARGEST),
    "labels.weight": (0, LARGEST),
    "batch_size": (1, LARGEST),
    "run.accumulate": (0, LARGEST),
    "run.log_every": (1, LARGEST),
    "run.eval_every": (0, LARGEST),
    "run.checkpoint_every": (0, LARGEST),
    "run.threads": (0, 1024),
    "run.turn_seconds": (0, 3600),
    "run.workers": (0, 1024),
}


def check_ranges(config: Mapping) -> None:
    """Raises InputError for the first number out of its range, or pair that is none.

    Args:
      config: field, with dots between its parts -> value, for every field of RANGES.
    """
    for field, (low, high) in RANGES.items():
        value = config[field]
        pair = field in ("augment.scale", "augment.ratio")
        numbers = tuple(value) if pair else (value,)
        if pair and (len(numbers) != 2 or numbers[0] > numbers[1]):
            raise InputError(f"{field} must be two numbers, the smaller first, got {value}")
        if not all(low <= number <= high for number in numbers):
            least = "above 0" if low == POSITIVE else f"{low} or more"
            most = {LARGEST: "", BELOW_ONE: " and below 1"}.get(high, f" and at most {high}")
            raise InputError(f"{field} must be {least}{most}, got {value}")
