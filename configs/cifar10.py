# SPDX-License-Identifier: Apache-2.0
"""EViT on CIFAR-10 at its own 32 pixels, from class folders or from TFDS.

    python train.py --config=configs/cifar10.py --workdir=runs/cifar10 --config.data.dir=FOLDER
    python train.py --config=configs/cifar10.py:cpu,keep_rate=0.5 ...

`cpu` is a small model and three epochs: about ten minutes on one core (docs/results.md).
FOLDER holds train/ and test/ with a folder of images per class. A set prepared by TFDS as
ArrayRecord is read with --config.data.name=tfds and its folder as data.dir.
"""

from configs import common


def get_config(text: str = ""):
    chosen = common.arguments(text, keep_rate=0.7, cpu=False, debug=False)
    config = common.get_config()
    with config.unlocked():
        config.batch_size = 128
        config.epochs = 100.0

        config.model.update(
            name="vit",
            image_size=(32, 32),
            patch_size=(4, 4),
            width=192,
            depth=8,
            num_heads=3,
            num_classes=10,
            keep_rate=chosen["keep_rate"],
            drop_path_rate=0.1,
        )
        config.optimizer.lr = 1e-3
        config.optimizer.clip_norm = 1.0

        config.data.name = "folder"
        config.augment.scale = (0.4, 1.0)

        if chosen["cpu"]:
            config.batch_size = 64
            config.epochs = 3.0
            config.model.update(width=64, depth=6, num_heads=2, drop_path_rate=0.0)
            config.optimizer.warmup_epochs = 0.5
            config.augment.scale = (0.7, 1.0)
            config.data.cache = True
            config.run.test_batch_size = 200

        if chosen["debug"]:
            config.batch_size = 32
            config.epochs = 1.0
            config.model.update(width=48, depth=4)
            config.data.name = "synthetic"
            config.run.update(log_every=4, turn_seconds=0.01)
    return config
