# SPDX-License-Identifier: Apache-2.0
"""EViT on LV-ViT from scratch: token labeling's recipe, 300 epochs at batch 1024.

    python train.py --config=configs/evit_lvvit.py --workdir=DIR --config.data.dir=IMAGENET \\
        --config.labels.dir=MAPS
    python train.py --config=configs/evit_lvvit.py:size=medium,keep_rate=0.5 ...
    python train.py --config=configs/evit_lvvit.py:image_size=384 --config.weights=LVVIT \\
        --config.batch_size=512 --config.epochs=30 --config.optimizer.lr=5e-6 \\
        --config.optimizer.min_lr=5e-6 --config.optimizer.weight_decay=1e-8 \\
        --config.keep_warmup.start_epoch=0 --config.keep_warmup.epochs=0 ...        fine-tuning

Arguments: size (tiny, small, medium), keep_rate (1 trains the dense model), fuse, image_size,
debug. Blocks 4, 8 and 12 of the small model's 16 reduce, or those at the quarters of another's
depth, and the keep rate is lowered from epoch 10 to 110. MAPS has the label map of every training
image, of evit_jax.tools.label or as the authors publish them, see docs/token_labeling.md; without
it patches learn their image's class. IMAGENET as for configs/evit_deit.py.

The papers report a top-1 of 83.3 % for the small dense model, and with EViT 83.0 at 0.7 and 82.5 at
0.5. No run of this file has been carried to its end yet.
"""

from configs import common
from configs.evit_deit import shrink
from evit_jax.errors import check_name

ARGUMENTS = dict(size="small", keep_rate=0.7, fuse=True, image_size=224, debug=False)
DROP_PATH = dict(tiny=0.1, small=0.1, medium=0.2)


def get_config(text: str = ""):
    chosen = common.arguments(text, **ARGUMENTS)
    check_name("size", chosen["size"], DROP_PATH)
    config = common.get_config()
    with config.unlocked():
        config.batch_size = 1024
        config.epochs = 300.0
        config.ema_decay = 0.99992
        config.model.update(
            name=f"lvvit_{chosen['size'][0]}",
            image_size=(chosen["image_size"],) * 2,
            keep_rate=chosen["keep_rate"],
            reducer=f"evit:fuse={chosen['fuse']}",
            drop_path_rate=DROP_PATH[chosen["size"]],
            dtype="bfloat16",
        )
        config.keep_warmup.update(start_epoch=10.0, epochs=100.0)
        # 1.6e-3 for every 1024 images, also when the batch size is overridden.
        config.optimizer.lr = config.get_ref("batch_size").to_float() * (1.6e-3 / 1024)
        config.data.name = "tfds"
        config.augment.randaugment_magnitude = 9.0
        config.mix.update(erasing=0.25, token=1.0)
        config.run.test_batch_size = 1024
    if chosen["debug"]:
        config.keep_warmup.update(start_epoch=0.0, epochs=0.0)
        shrink(config)
        with config.unlocked():
            config.model.name = "lvvit"
    return config
