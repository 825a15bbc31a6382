# SPDX-License-Identifier: Apache-2.0
"""A small EViT on handwritten digits: a real run in about a minute, with nothing to download.

python train.py --config=configs/digits.py --workdir=runs/digits
"""

from configs import common


def get_config(text: str = ""):
    chosen = common.arguments(text, keep_rate=0.7, debug=False)
    config = common.get_config()
    with config.unlocked():
        config.batch_size = 32
        config.epochs = 30.0

        config.model.update(
            name="vit",
            image_size=(32, 32),
            patch_size=(4, 4),
            width=64,
            depth=6,
            num_heads=4,
            num_classes=10,
            keep_rate=chosen["keep_rate"],
            layers=(1, 2, 3) if chosen["keep_rate"] else None,
        )
        config.optimizer.warmup_epochs = 3.0

        config.data.name = "digits"
        config.augment.scale = (0.8, 1.0)
        config.augment.ratio = (0.9, 1.1)
        config.augment.flip = False  # a mirrored 2 is no digit

        config.run.log_every = 90
        config.run.eval_every = 5.0
        config.run.checkpoint_every = 5.0

        if chosen["debug"]:
            config.epochs = 2.0
            config.run.turn_seconds = 0.01
            config.model.update(width=32, depth=4, layers=(1, 2) if chosen["keep_rate"] else None)
    return config
