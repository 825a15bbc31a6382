# SPDX-License-Identifier: Apache-2.0
"""What the classes of ImageNet-1k are called, to show people; data sets bring names of their own.

imagenet_names.json is a list in the order of all published models, that of the sorted WordNet
ids: the first word of each class's synset in WordNet 3.0 (https://wordnet.princeton.edu), whose
license is beside it. Three are changed, so that no two are the same: the cranes and the tank suit.
"""

import functools
from pathlib import Path

from evit_jax.data import read_classes


@functools.cache
def imagenet_names() -> tuple[str, ...]:
    """The 1000 names, in class order, such as "tench"."""
    return read_classes(Path(__file__).with_name("imagenet_names.json"))
