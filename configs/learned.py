# SPDX-License-Identifier: Apache-2.0
"""Methods that learn what to keep, from a trained dense DeiT, each by its own published recipe.

    python train.py --config=configs/learned.py --config.weights=DEIT.safetensors \\
        --workdir=DIR --config.data.dir=IMAGENET
    python train.py --config=configs/learned.py:method=cropr,size=tiny,keep_rate=0.5 ...
    python train.py --config=configs/learned.py:method=diffrate_search,keep_rate=0.6 ...

Arguments: method (dynamicvit, cropr, diffrate_search, sit, patchmerger, stvit), size (tiny, small,
base), keep_rate, image_size, debug; teacher and budget follow these, and no later --config.model.*.
IMAGENET as in configs/evit_deit.py. The keep rate is for blocks 3, 6 and 9; cropr and
diffrate_search, which reduce in every block, and stvit, which reduces in block 4 alone, get the
multiply-accumulates of that plan as their budget.

  dynamicvit       30 epochs; predictors at 1e-3, the rest at a hundredth of it and not before epoch
                   5; cross entropy + 0.5 KL and 0.5 token difference to the dense DeiT + 2 times
                   (base: 5) the ratio loss. The losses are scaled by 2/3 together, since the shares
                   of labels and teacher add up to 1 here. Published for the small model at 0.9, 0.8
                   and 0.7: 79.8, 79.6 and 79.3 %.
  cropr            50 epochs; query and training heads at 1e-3. Published for ViT-L from MAE with a
                   learning rate that decays by layer, for which the rest trains at 4e-5 here.
  diffrate_search  3 epochs, the counts alone, from 0.01 to 0.001. Then
                   python -m evit_jax.tools.learned_plan --workdir=DIR --out=plan.json
  sit              125 epochs at 2e-4; cross entropy + 2 KL to the dense DeiT + 2 times the squared
                   difference of recovered tokens from its tokens, after every block that has fewer;
                   scaled by 1/3. The paper starts from LV-ViT.
  patchmerger      as sit, but for the tokens, which is our choice: the paper trains from scratch.
  stvit            as patchmerger, our choice too: the paper trains from scratch as DeiT does.

No run on ImageNet has been made with this file yet; docs/methods.md has small ones.
"""

from configs import common
from configs.evit_deit import ARGUMENTS, deit, shrink
from evit_jax.errors import check_name
from evit_jax.models import build_model
from evit_jax.plan.flops import macs

METHODS = ("dynamicvit", "cropr", "diffrate_search", "sit", "patchmerger", "stvit")


def get_config(text: str = ""):
    arguments = {name: value for name, value in ARGUMENTS.items() if name != "fuse"}
    chosen = common.arguments(text, method="dynamicvit", **arguments)
    method = check_name("method", chosen["method"], METHODS)
    large = chosen["size"] == "base"
    config = deit(chosen | dict(fuse=False))
    # The teacher is the dense model that the run starts from.
    teacher = dict(teacher=config.model.name, weights=config.get_ref("weights"), hard=False)
    with config.unlocked():
        config.model.reducer = method
        if method == "dynamicvit":
            weight = (5.0 if large else 2.0) * 2 / 3
            config.model.reducer = f"dynamicvit:ratio_weight={weight:.6g}"
            config.model.drop_path_rate = 0.2 if large else 0.0
            config.update(epochs=30.0, ema_decay=0.9999)
            config.optimizer.update(min_lr=1e-6, backbone_lr=0.01, backbone_start_epoch=5.0)
            config.distill.update(alpha=1 / 3, tokens=1 / 3, **teacher)
        elif method == "cropr":
            config.epochs = 50.0
            config.model.drop_path_rate = 0.2
            config.optimizer.update(min_lr=1e-6, backbone_lr=0.04)
        elif method == "diffrate_search":
            config.epochs = 3.0
            config.optimizer.update(lr=1e-2, min_lr=1e-3, warmup_epochs=0.0, backbone_lr=0.0)
        else:
            config.epochs = 125.0
            config.optimizer.update(lr=2e-4, min_lr=1e-6)
            config.distill.update(alpha=2 / 3, **teacher)
            if method == "sit":
                config.model.reducer = "sit:recovery=True"
                config.distill.tokens = 2 / 3
    if chosen["debug"]:
        shrink(config)
        with config.unlocked():
            config.optimizer.backbone_start_epoch /= 50
            if config.distill.teacher:
                config.distill.update(teacher="self", weights="")
    if method in ("cropr", "diffrate_search", "stvit") and chosen["keep_rate"]:
        like = {name: value for name, value in config.model.items() if name != "reducer"}
        with config.unlocked(), config.ignore_type():
            config.model.macs = float(macs(build_model(**like, reducer="topk")))
            config.model.keep_rate = None
    return config
