# SPDX-License-Identifier: Apache-2.0
"""EViT from a trained dense DeiT to handwritten digits: minutes on a CPU, no data to download.

    python train.py --config=configs/digits_finetune.py --config.weights=DEIT.safetensors \\
        --workdir=DIR
    python train.py --config=configs/digits_finetune.py:size=small,image_size=64 ...

Arguments: size (tiny, small, base), keep_rate, image_size, debug. DEIT.safetensors is what timm and
DeiT publish; its positions are resized to the smaller image, and its thousand classes make room for
ten that are drawn at random. With DeiT-Tiny at 96 pixels, 3 epochs are enough for more than 95 %.
"""

from configs import common
from configs.evit_deit import shrink

ARGUMENTS = dict(size="tiny", keep_rate=0.7, image_size=96, debug=False)


def get_config(text: str = ""):
    chosen = common.arguments(text, **ARGUMENTS)
    config = common.get_config()
    with config.unlocked():
        config.batch_size = 32
        config.epochs = 3.0
        config.new_head = True
        config.label_smoothing = 0.0  # the losses of training and test compare

        config.model.update(
            name=f"deit_{chosen['size']}_patch16_224",
            image_size=(chosen["image_size"],) * 2,
            num_classes=10,
            keep_rate=chosen["keep_rate"],
        )
        config.optimizer.lr = 3e-4
        config.optimizer.warmup_epochs = 0.5
        config.optimizer.clip_norm = 1.0

        config.data.name = "digits"
        config.augment.scale = (0.7, 1.0)
        config.augment.ratio = (0.85, 1.18)
        config.augment.flip = False  # a mirrored 2 is no digit

        config.run.test_batch_size = 128
        config.run.log_every = 5
    if chosen["debug"]:
        shrink(config)
        with config.unlocked():
            config.new_head = False  # there are no weights to take it from
    return config
