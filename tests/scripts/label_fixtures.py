# SPDX-License-Identifier: Apache-2.0
"""Writes tests/fixtures/labels: what PyTorch and torchvision make of label maps.

python -m tests.scripts.label_fixtures

Needs torchvision (0.29.1 wrote the committed files). map.pt is a map as token labeling's authors
publish them, (2, 5, 3, 4) float16; crops.npz has random maps and boxes, in fractions of the image,
and `roi_align` of them, computed in float64. tests/data/test_labels.py and
tests/training/test_labeling.py read them.
"""

import pathlib

import numpy as np

FOLDER = pathlib.Path(__file__).parents[1] / "fixtures/labels"
SIZES = {"square": (14, 14), "wide": (3, 5), "one": (1, 1)}


def main() -> None:
    import torch
    from torchvision.ops import roi_align

    rng = np.random.default_rng(0)
    ids = rng.permutation(1000)[:60].reshape(5, 3, 4)
    logits = np.sort(rng.normal(5, 3, (5, 3, 4)), axis=0)[::-1]
    torch.save(torch.from_numpy(np.stack([logits, ids])).half(), FOLDER / "map.pt")

    maps = rng.normal(size=(12, 1, 18, 16)).astype(np.float32)
    corner = rng.uniform(0, 0.9, (12, 2))
    corner = np.concatenate([corner, corner + rng.uniform(0.02, 1, (12, 2)) * (1 - corner)], axis=1)
    boxes = corner.astype(np.float32)  # top, left, bottom, right
    boxes[0], boxes[1] = (0, 0, 1, 1), (0.5, 0.5, 0.5, 0.5)
    places = boxes.astype(np.float64) * [18, 16, 18, 16] - 0.5
    rois = np.concatenate([np.arange(12)[:, None], places[:, [1, 0, 3, 2]]], axis=1)
    settings = dict(spatial_scale=1.0, sampling_ratio=-1, aligned=False)
    exact = torch.from_numpy(maps).double(), torch.from_numpy(rois)
    crops = {name: roi_align(*exact, size, **settings).float() for name, size in SIZES.items()}
    np.savez_compressed(FOLDER / "crops.npz", maps=maps, boxes=boxes, **crops)


if __name__ == "__main__":
    main()
