# SPDX-License-Identifier: Apache-2.0
"""Writes tests/fixtures/encoders: small models of timm's, and what they answer.

python -m tests.scripts.timm_fixtures [NAMES]

Needs timm (1.0.31 wrote the committed files). For every name NAME.safetensors is the state of a
model that is as narrow as SIZES says, all of it random, as timm saves it; NAME.npz is what the
model answers to images.npy, at the size of the file and, resized by timm as it loads, at another
size and aspect. tests/models/test_encoders.py reads them.
"""

import argparse
import warnings
import zlib

import numpy as np

from tests.compare_timm import randomize, theirs
from tests.models.test_encoders import FILES, PIXELS, SIZES


def write(name: str) -> None:
    """The two files of one name."""
    import timm
    from safetensors.torch import save_file

    changes = dict(SIZES, embed_dim=SIZES["width"])
    changes.pop("width")
    model = timm.create_model(name, img_size=PIXELS["native"], **changes).eval()
    randomize(model, zlib.crc32(name.encode()))
    file = FILES / f"{name}.safetensors"
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, file)
    images, answers = np.load(FILES / "images.npy"), {}
    for label, (height, width) in PIXELS.items():
        if label == "other":
            loaded = dict(file=str(file), num_classes=SIZES["num_classes"], custom_load=False)
            model = timm.create_model(
                name,
                pretrained=True,
                pretrained_cfg_overlay=loaded,
                img_size=PIXELS["other"],
                **changes,
            ).eval()
        for key, value in theirs(model, images[:, :height, :width]).items():
            answers[f"{label}_{key}"] = value
    np.savez_compressed(FILES / f"{name}.npz", **answers)


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAMES", help="default: those that are there")
    flags = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    names = flags.names or sorted(path.stem for path in FILES.glob("*.npz"))
    for name in names:
        write(name)
        print(name, flush=True)


if __name__ == "__main__":
    main()
