# SPDX-License-Identifier: Apache-2.0
"""Every field once, with its meaning; the other files here start from this one and change some.

Override any of them on the command line: --config.batch_size=256 --config.model.keep_rate=0.5
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from evit_jax.errors import check_names
from evit_jax.spec import parse_fields


def arguments(text: str, **defaults) -> dict:
    """What follows the colon of --config=FILE.py:keep_rate=0.5,debug over these defaults."""
    given = parse_fields(text)
    check_names("configuration argument", given, defaults)
    return defaults | given


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0  # of initial weights, order of the data, augmentation, DropPath
    config.batch_size = 128  # images per step, over all devices
    config.epochs = 30.0  # passes over the training images
    config.weights = ""  # start from this file's, see create_model; "" draws them
    config.new_head = False  # draw the classifier, where the file has none or other classes
    config.loss = "ce"  # of images: cross entropy; "bce": every class by itself (DeiT-III)
    config.label_smoothing = 0.1
    config.ema_decay = 0.0  # of the averaged weights, which are then evaluated; 0 keeps none
    # Keep rates that one checkpoint shall serve, such as (1.0, 0.7, 0.5): every step trains the
    # largest, the smallest and a random one between, and the smaller ones also learn from the
    # largest one's logits. Evaluation during training is at model.keep_rate. () trains only that.
    config.sandwich = ()
    config.dry_run = False  # print parameters, token plan, MACs and memory, then stop

    config.model = ConfigDict()
    config.model.name = "deit_small_patch16_224"  # a variant, or a backbone ("vit") with settings
    config.model.keep_rate = placeholder(float)  # of the patch tokens, at each of `layers`
    config.model.layers = placeholder(tuple)  # 0-based; None: the reducer's own
    # Instead of keep_rate, which --config=FILE.py:keep_rate=None unsets:
    config.model.keep_rates = placeholder(tuple)  # one rate per block
    config.model.tokens = placeholder(tuple)  # counts, per layer or per block
    config.model.macs = placeholder(float)  # multiply-accumulates of an image not to be exceeded
    config.model.plan = ""  # a file of calibrate's: counts and their reducer
    config.model.multiple_of = 1  # rounds the tokens after each reducing block up to a multiple
    config.model.reducer = "evit"  # or evit:fuse=False, random, tome:r=13 (without keep_rate)
    config.model.num_classes = 1000
    config.model.image_size = placeholder(tuple)  # 240 or (height, width); None: its own
    config.model.drop_path_rate = 0.0  # stochastic depth of the last block
    config.model.drop_path = "linear"  # from 0 at the first block; "constant": alike in all
    config.model.layer_scale = placeholder(float)  # LayerScale's first factors; None: its own
    config.model.dropout_rate = 0.0
    config.model.remat = False  # recompute in the backward pass: less memory, a third more work
    config.model.dtype = "float32"  # of the computation; "bfloat16" on TPU and GPU

    config.keep_warmup = ConfigDict()  # lowers the keep rate from 1 along a cosine
    config.keep_warmup.start_epoch = 0.0
    config.keep_warmup.epochs = 0.0  # 0: the target rate from start_epoch on
    config.keep_warmup.rungs = 8  # equal falls the cosine is rounded to, one compilation each

    config.progressive = ConfigDict()  # coarse patches first, before those of keep_warmup
    config.progressive.factors = ()  # (4, 2): patches 4 times as high and wide, then twice
    config.progressive.epochs = 0.0  # of each

    config.optimizer = ConfigDict()
    config.optimizer.name = "adamw"  # or "lamb" (DeiT-III, with clip_norm=1)
    config.optimizer.lr = 1e-3  # highest learning rate, at this batch size
    config.optimizer.warmup_lr = 1e-6  # at step 0
    config.optimizer.warmup_epochs = 5.0
    config.optimizer.min_lr = 1e-5  # at the end of the cosine
    config.optimizer.weight_decay = 0.05
    config.optimizer.clip_norm = 0.0  # of all gradients together; 0 does not clip
    # Of all but the reducers' own parameters, as a share of the learning rate; 0 freezes them
    # (not the running statistics of a batch norm).
    config.optimizer.backbone_lr = 1.0
    config.optimizer.backbone_start_epoch = 0.0  # they are frozen until then
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.999

    config.data = ConfigDict()
    config.data.name = "folder"  # digits, folder, synthetic, tfds
    config.data.dir = ""  # folder: holds train/ and val/; tfds: the prepared data set
    config.data.classes = ""  # folder: JSON list of class folders in the model's order
    config.data.cache = False  # keep decoded images in memory: for small sets
    config.data.damaged = "stop"  # at an image that cannot be read, or "skip" and name it

    config.augment = ConfigDict()  # of the training images, on the host
    config.augment.crop = "resized"  # or "simple": nearly all of the image (DeiT-III on 21k)
    config.augment.scale = (0.08, 1.0)  # area of the resized crop
    config.augment.ratio = (3 / 4, 4 / 3)  # its aspect
    config.augment.flip = True  # left and right, half of the time
    config.augment.three_augment = False  # gray, solarized or blurred, a third each (DeiT-III)
    config.augment.randaugment_magnitude = 0.0  # 9 in DeiT (rand-m9-mstd0.5-inc1); 0: off
    config.augment.randaugment_std = 0.5  # of the magnitude
    config.augment.randaugment_layers = 2  # operations per image
    config.augment.color_jitter = 0.0  # where RandAugment is off
    config.augment.repeats = 1  # times an image is drawn in a row (repeated augmentation; DeiT: 3)

    config.mix = ConfigDict()  # and on the device
    config.mix.erasing = 0.0  # probability of random erasing (pixel mode); DeiT: 0.25
    config.mix.mixup = 0.0  # alpha of its beta distribution; DeiT: 0.8
    config.mix.cutmix = 0.0  # the same; DeiT: 1.0
    config.mix.switch = 0.5  # how often cutmix, where both are on
    config.mix.token = 0.0  # MixToken: alpha of its beta distribution, LV-ViT: 1.0; not with those

    config.labels = ConfigDict()  # token labeling, of models with a head for patches (LV-ViT)
    # Maps of the training images, see evit_jax.tools.label; "": patches learn their image's class.
    config.labels.dir = ""
    config.labels.weight = 1.0  # of the patches' loss; 0: only the image's
    config.labels.ground_truth = False  # mix the true class into what an image learns from its map
    config.labels.transposed = False  # exchange the axes of the crop, see docs/token_labeling.md

    config.distill = ConfigDict()
    config.distill.teacher = ""  # a model's name; "self": the student run dense; FILE.npy: logits
    config.distill.weights = ""  # of the named model
    config.distill.hard = True  # learn its decisions; False: its softened probabilities
    config.distill.alpha = 0.5  # share of its part in the loss
    config.distill.temperature = 1.0  # of soft distillation
    config.distill.tokens = 0.0  # weight of the tokens' squared difference; needs a model

    # May change when a run is resumed: only rounding depends on it, and with a batch norm (LV-ViT)
    # what its statistics are taken over, by `parallel` and `accumulate`.
    config.run = ConfigDict()
    config.run.parallel = "jit"  # or "pmap"
    config.run.shard_params = False  # jit: spread the state over the devices too, to save memory
    config.run.accumulate = 0  # micro-batches of a step, to save memory; 0: chosen for the device
    config.run.test_batch_size = 256  # over all devices
    config.run.log_every = 50  # steps
    config.run.eval_every = 1.0  # epochs; 0: only at the end
    config.run.checkpoint_every = 1.0  # epochs; 0: only at the end
    config.run.threads = 0  # that decode images; 0: one per processor
    config.run.turn_seconds = 0.2  # of each of the ten turns that time the finished model
    config.run.workers = 0  # processes that do it instead, for many processors
    return config.lock()
