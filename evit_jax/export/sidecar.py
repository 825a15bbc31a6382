# SPDX-License-Identifier: Apache-2.0
"""preprocessing.json: what whoever runs an exported file has to know and the file does not say."""

import json
from collections.abc import Sequence
from importlib import metadata

import jax

from evit_jax.models.card import Preprocessing
from evit_jax.reducers import as_spec


def preprocessing_json(
    name: str, model, card: Preprocessing, classes: Sequence[str] | None = None
) -> str:
    """How pixels become the input, and what the model is, as JSON.

    Args:
      name: the model's, or its workdir.
      classes: names in the order of the logits, where they are known.
    """
    height, width = model.image_size
    about = dict(
        input=dict(
            layout="NHWC",
            shape=["batch", height, width, 3],
            dtype="float32",
            channels="RGB",
            steps=[
                "resize height and width to size / crop, antialiased"
                if card.squash
                else "resize so that the image covers size / crop, aspect kept, antialiased",
                "crop size from the center",
                "divide by 255, subtract mean, divide by std",
            ],
            size=[height, width],
            crop=card.crop,
            interpolation=card.interpolation,
            squash=card.squash,
            mean=list(card.mean),
            std=list(card.std),
        ),
        output=dict(
            name="logits" if model.num_classes else "features",
            size=model.num_classes or model.width,
            classes=list(classes) if classes else None,
        ),
        model=name,
        reducer=as_spec(model.reducer),
        keep=list(model.kept),
        tokens_per_block=list(model.tokens_per_block),
        versions=dict(evit_jax=metadata.version("evit_jax"), jax=jax.__version__),
    )
    return json.dumps(about, indent=1) + "\n"
