# SPDX-License-Identifier: Apache-2.0
"""EViT from a trained dense DeiT: 30 epochs at a low learning rate, as the paper fine-tunes.

    python train.py --config=configs/evit_deit_finetune.py --config.weights=DEIT.safetensors \\
        --workdir=DIR --config.data.dir=IMAGENET
    python train.py --config=configs/evit_deit_finetune.py:size=tiny,keep_rate=0.5 ...
    python train.py --config=configs/evit_deit_finetune.py:image_size=256,keep_rate=0.6 ...
    ... --config.sandwich="(1.0,0.7,0.5)"     one checkpoint for all rates from 1 to 0.5
    ... --config.distill.teacher=self         learns from its own dense forward pass

Arguments as in configs/evit_deit.py. As in the paper's code the model trains as it is evaluated,
without stochastic depth, and the keep rate is there from the first step. DEIT.safetensors is what
timm and DeiT publish (.pth too); positions are resized where the image size is another one.

The paper's code reports 78.5 % at 0.5 for the small model, its users 78.3. docs/results.md has a
run on a part of Tiny-ImageNet; none on ImageNet has been made with this file yet.
"""

from configs import common
from configs.evit_deit import ARGUMENTS, deit, shrink


def get_config(text: str = ""):
    chosen = common.arguments(text, **ARGUMENTS)
    config = deit(chosen)
    with config.unlocked():
        config.epochs = 30.0
        # 2e-5 for every 512 images, also when the batch size is overridden.
        config.optimizer.lr = config.get_ref("batch_size").to_float() * (2e-5 / 512)
        config.optimizer.update(min_lr=2e-6, warmup_epochs=0.0, weight_decay=1e-6)
    if chosen["debug"]:
        shrink(config)
    return config
