# SPDX-License-Identifier: Apache-2.0
"""EViT-DeiT-S on ImageNet: batch 1024, 300 epochs, keep rate lowered from epoch 10 to 110.

    python train.py --config=configs/evit_deit_s.py --workdir=DIR --config.data.dir=IMAGENET
    python train.py --config=configs/evit_deit_s.py:keep_rate=0.5 ...
    python train.py --config=configs/evit_deit_s.py --workdir=DIR --config.dry_run=True

IMAGENET is TFDS' imagenet2012 prepared as ArrayRecord; for class folders (train/ and val/) add
--config.data.name=folder. Random resized crop and flip are the whole augmentation so far, so the
paper's accuracy is not to be expected; this file has not been run to its end.
"""

from configs import common


def get_config(text: str = ""):
    chosen = common.arguments(text, keep_rate=0.7, debug=False)
    config = common.get_config()
    with config.unlocked():
        config.batch_size = 1024
        config.epochs = 300.0
        config.ema_decay = 0.99996

        config.model.update(
            name="deit_small_patch16_224",
            keep_rate=chosen["keep_rate"],
            drop_path_rate=0.1,
            dtype="bfloat16",
        )
        config.keep_warmup.update(start_epoch=10.0, epochs=100.0)

        # 5e-4 for every 512 images, also when the batch size is overridden.
        config.optimizer.lr = config.get_ref("batch_size").to_float() * (5e-4 / 512)

        config.data.name = "tfds"

        config.run.test_batch_size = 1024

        if chosen["debug"]:
            config.batch_size = 16
            config.epochs = 0.5
            config.model.update(
                name="vit", image_size=(32, 32), patch_size=(8, 8), width=48, depth=4, num_heads=3
            )
            config.keep_warmup.update(start_epoch=0.1, epochs=0.2, rungs=2)
            config.optimizer.warmup_epochs = 0.1
            config.data.name = "synthetic"
            config.run.update(test_batch_size=16, log_every=4)
    return config
