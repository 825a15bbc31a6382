# SPDX-License-Identifier: Apache-2.0
"""DeiT-III's recipe, for EViT or without it: 3-Augment, LAMB and a binary cross entropy.

    python train.py --config=configs/deit3.py --workdir=DIR --config.data.dir=IMAGENET
    python train.py --config=configs/deit3.py:model=base ...                        then
    python train.py --config=configs/deit3.py:model=base,stage=finetune_224 \\
        --config.weights=DIR/WEIGHTS.safetensors --workdir=DIR2 ...                 and perhaps
    python train.py --config=configs/deit3.py:model=base,stage=finetune_384 ...

Arguments: model (small, base, large), stage (pretrain, finetune_224, finetune_384), keep_rate (1
trains the dense model), debug. The larger two are pre-trained at 192 pixels, so that 224 is a stage
of its own; positions are resized. `python -m evit_jax.tools.convert DIR WEIGHTS.safetensors` makes
the weights file of a stage. IMAGENET as for configs/evit_deit.py. The keep rate is lowered from
epoch 10 to 110, as EViT does; fine-tuning has it from the first step.

DeiT-III's authors report for the dense models, on ImageNet-1k alone, a top-1 of 81.4, 83.8 and
84.9 % at 224 pixels and 83.4, 85.0 and 85.8 % at 384, tested on a crop of the whole image, which
here, as in timm, only 384 pixels have (224: 0.9). No run of this file has been carried to its end.
"""

from configs import common
from configs.evit_deit import shrink
from evit_jax.errors import InputError, check_name

ARGUMENTS = dict(model="small", stage="pretrain", keep_rate=0.7, debug=False)
# Of each model: learning rate, stochastic depth and image size of each stage that it has.
LR = dict(small=4e-3, base=3e-3, large=3e-3)
DROP_PATH = dict(
    pretrain=dict(small=0.05, base=0.2, large=0.45),
    finetune_224=dict(base=0.2, large=0.45),
    finetune_384=dict(small=0.0, base=0.15, large=0.4),
)
PIXELS = dict(pretrain=dict(small=224, base=192, large=192), finetune_224=224, finetune_384=384)


def get_config(text: str = ""):
    chosen = common.arguments(text, **ARGUMENTS)
    model, stage = chosen["model"], chosen["stage"]
    check_name("model of DeiT-III", model, LR)
    check_name("stage of DeiT-III", stage, DROP_PATH)
    if model not in DROP_PATH[stage]:
        raise InputError(f"{model} has no stage {stage}: it is pre-trained at 224 pixels already")
    pixels = PIXELS[stage][model] if stage == "pretrain" else PIXELS[stage]

    config = common.get_config()
    with config.unlocked():
        config.model.update(
            name=f"deit3_{model}_patch16_{384 if pixels == 384 else 224}",
            image_size=(pixels,) * 2,
            keep_rate=chosen["keep_rate"],
            drop_path_rate=DROP_PATH[stage][model],
            drop_path="constant",
            layer_scale=1e-4,
            dtype="bfloat16",
        )
        config.data.name = "tfds"
        config.ema_decay = 0.99996
        if stage == "pretrain":
            config.batch_size = 2048
            config.epochs = 800.0
            config.loss = "bce"
            config.label_smoothing = 0.0
            config.keep_warmup.update(start_epoch=10.0, epochs=100.0)
            config.optimizer.update(name="lamb", lr=LR[model], clip_norm=1.0)
            config.augment.update(three_augment=True, color_jitter=0.3, repeats=3)
        else:
            config.batch_size = 512
            config.epochs = 20.0
            config.optimizer.update(lr=1e-5, weight_decay=0.1)
            config.augment.update(randaugment_magnitude=9.0)
        config.mix.update(mixup=0.8, cutmix=1.0)
        config.run.test_batch_size = 1024
    if chosen["debug"]:
        config.keep_warmup.update(start_epoch=0.0, epochs=0.0)
        shrink(config)
    return config
