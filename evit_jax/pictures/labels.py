# SPDX-License-Identifier: Apache-2.0
"""Pictures of label maps: what a machine annotator saw in each cell of an image, in NumPy.

Letters: P cells of one map, H and W pixels of a panel.
"""

import numpy as np

from evit_jax.pictures.patches import spread

# Easily told apart, also without seeing red and green apart (Okabe and Ito's).
COLORS = np.array(
    [[230, 159, 0], [86, 180, 233], [0, 158, 115], [240, 228, 66], [213, 94, 0], [204, 121, 167]]
)
OTHERS = np.array([128, 128, 128])


def leading(classes: np.ndarray, count: int = len(COLORS)) -> list[int]:
    """The classes (P,) that most cells have, most cells first; those that have a color."""
    found, cells = np.unique(classes, return_counts=True)
    return found[np.argsort(-cells, kind="stable")][:count].tolist()


def labels_panel(
    base: np.ndarray,
    classes: np.ndarray,
    weights: np.ndarray,
    colored: list[int],
    grid: tuple[int, int],
    cell: tuple[int, int],
) -> np.ndarray:
    """The gray image in the colors of its cells' classes: (H, W, 3) uint8.

    Args:
      base: (H, W, 3) uint8.
      classes, weights: (P,) the class of each cell, and in [0, 1] how strong its color is.
      colored: the classes in the order of COLORS; any other is gray.
    """
    table = {label: COLORS[number] for number, label in enumerate(colored)}
    colors = np.stack([table.get(label, OTHERS) for label in classes.tolist()])
    color = np.stack([spread(channel, grid, cell) for channel in colors.T], axis=-1)
    weight = spread(weights, grid, cell)[..., None]
    gray = np.broadcast_to(base.mean(axis=2, keepdims=True), base.shape)
    return (gray * (1 - 0.6 * weight) + color * (0.6 * weight)).round().astype(np.uint8)
