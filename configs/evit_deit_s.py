# SPDX-License-Identifier: Apache-2.0
"""EViT-DeiT-S on ImageNet from scratch: configs/evit_deit.py at its size "small".

python train.py --config=configs/evit_deit_s.py --workdir=DIR --config.data.dir=IMAGENET
python train.py --config=configs/evit_deit_s.py:keep_rate=0.5 ...
python train.py --config=configs/evit_deit_s.py --workdir=DIR --config.dry_run=True
"""

from configs import evit_deit


def get_config(text: str = ""):
    return evit_deit.get_config(text)
