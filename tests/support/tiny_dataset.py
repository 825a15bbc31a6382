# SPDX-License-Identifier: Apache-2.0
"""A TFDS builder for the tests; TFDS wants builders in a module of their own."""

import io

import tensorflow_datasets as tfds

from tests.data.test_sources import jpeg


class Tiny(tfds.core.GeneratorBasedBuilder):
    """Red and blue rectangles."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        label = tfds.features.ClassLabel(names=["red", "blue"])
        features = tfds.features.FeaturesDict({"image": tfds.features.Image(), "label": label})
        return self.dataset_info_from_configs(features=features)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(6), "validation": self._generate_examples(4)}

    def _generate_examples(self, count):
        for index in range(count):
            color = (0, 0, 200) if index % 2 else (200, 0, 0)
            yield index, {"image": io.BytesIO(jpeg(color)), "label": index % 2}
