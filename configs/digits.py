# SPDX-License-Identifier: Apache-2.0
"""A small EViT on handwritten digits: a real run in about two minutes, with nothing to download.

python train.py --config=configs/digits.py --workdir=runs/digits
"""

from configs import common


def get_config(text: str = ""):
    chosen = common.arguments(text, keep_rate=0.7, debug=False)
    config = common.get_config()
    with config.unlocked():
        config.batch_size = 32
        config.epochs = 60.0
        config.ema_decay = 0.98  # few images and a high learning rate: the average is steadier

        config.model.update(
            name="vit",
            image_size=(24, 24),  # three pixels for each of the 8x8 that there really are
            patch_size=(4, 4),
            width=64,
            depth=6,
            num_heads=4,
            num_classes=10,
            keep_rate=chosen["keep_rate"],
            layers=(1, 2, 3) if chosen["keep_rate"] else None,
        )
        config.optimizer.lr = 2e-3
        config.optimizer.warmup_epochs = 3.0
        config.optimizer.clip_norm = 1.0

        config.data.name = "digits"
        config.augment.scale = (0.7, 1.0)
        config.augment.ratio = (0.85, 1.18)
        config.augment.flip = False  # a mirrored 2 is no digit

        config.run.log_every = 180
        config.run.eval_every = 10.0
        config.run.checkpoint_every = 10.0

        if chosen["debug"]:
            config.epochs = 2.0
            config.model.update(width=32, depth=4, layers=(1, 2) if chosen["keep_rate"] else None)
            config.run.turn_seconds = 0.01
    return config
