# SPDX-License-Identifier: Apache-2.0
"""Pictures of what became of an image's patches, in NumPy and Pillow.

Letters: P original patches of one image, H and W pixels of a panel.
"""

import dataclasses
import math

import numpy as np
from PIL import Image, ImageDraw, ImageFont

DROPPED, FUSED, KEPT = -1, 0, 1  # the states of a patch
AREA = 168**2  # pixels of a panel, about: 12 for each of 14 x 14 patches, so cells are whole
TINT = np.array([0, 190, 175])  # of fused patches, a color that few photographs have
INK, PAPER, GREY = (20, 20, 20), (255, 255, 255), (110, 110, 110)
GAP = 8
HEAT = np.array(  # dark to bright, in equal steps, and readable without color
    [[0, 0, 4], [66, 10, 104], [147, 38, 103], [221, 81, 58], [252, 165, 10], [252, 255, 164]]
)


def patch_states(owner: np.ndarray) -> np.ndarray:
    """Owners (P,) of one image's patches after a block -> the state of each, (P,).

    A patch is kept where it is alone in its token, and fused where its token holds more than one,
    whichever method put them together and wherever that token is now.
    """
    sizes = np.bincount(owner[owner >= 0], minlength=owner.size)
    alone = sizes[np.maximum(owner, 0)] == 1
    return np.where(owner < 0, DROPPED, np.where(alone, KEPT, FUSED))


def cell_size(image_size: tuple[int, int], grid: tuple[int, int]) -> tuple[int, int]:
    """Height and width in whole pixels of a patch on a panel; its aspect stays, nearly."""
    scale = math.sqrt(AREA / math.prod(image_size))
    high, wide = (size / count for size, count in zip(image_size, grid, strict=True))
    return max(round(high * scale), 2), max(round(wide * scale), 2)


def base_panel(view: Image.Image, grid: tuple[int, int], cell: tuple[int, int]) -> np.ndarray:
    """The image as the model sees it, at the size of a panel: (H, W, 3) uint8."""
    size = grid[1] * cell[1], grid[0] * cell[0]
    return np.asarray(view.resize(size, Image.Resampling.LANCZOS))


def spread(values: np.ndarray, grid: tuple[int, int], cell: tuple[int, int]) -> np.ndarray:
    """One value per patch (P,) -> the same for every pixel, (H, W)."""
    return values.reshape(grid).repeat(cell[0], axis=0).repeat(cell[1], axis=1)


def patches_panel(
    base: np.ndarray, owner: np.ndarray, grid: tuple[int, int], cell: tuple[int, int]
) -> np.ndarray:
    """Kept patches untouched, dropped ones dark, fused ones tinted; a line around every token."""
    states = patch_states(owner)
    state = spread(states, grid, cell)
    grey = np.broadcast_to(base.mean(axis=2, keepdims=True), base.shape)
    panel = np.where((state == DROPPED)[..., None], 0.2 * grey, base)
    panel = np.where((state == FUSED)[..., None], 0.4 * grey + 0.3 * TINT, panel)

    token = spread(np.where(states == FUSED, owner, -1), grid, cell)
    around = np.pad(token, 1, constant_values=-1)
    neighbors = around[:-2, 1:-1], around[2:, 1:-1], around[1:-1, :-2], around[1:-1, 2:]
    border = (token >= 0) & np.any([token != other for other in neighbors], axis=0)
    return np.where(border[..., None], TINT, panel).round().astype(np.uint8)


def attention_panel(
    base: np.ndarray, attention: np.ndarray, grid: tuple[int, int], cell: tuple[int, int]
) -> np.ndarray:
    """Attention (P,) as a heat map over the faint image; its root, since few patches get most."""
    share = np.sqrt(attention / max(attention.max(), np.finfo(np.float32).tiny))
    steps = np.linspace(0, 1, len(HEAT))
    heat = np.stack([np.interp(share, steps, channel) for channel in HEAT.T], axis=-1)
    color = np.stack([spread(channel, grid, cell) for channel in heat.T], axis=-1)
    grey = base.mean(axis=2, keepdims=True) / 255
    return (color * (0.6 + 0.4 * grey)).round().astype(np.uint8)


@dataclasses.dataclass(frozen=True)
class Row:
    """One image: panels (H, W, 3), a label above each, and a line below them all."""

    panels: list[np.ndarray]
    labels: list[str]
    caption: str


def page(rows: list[Row], title: str, states: set[int]) -> Image.Image:
    """All rows below each other, with a title and a key to the states that occur."""
    text, small = ImageFont.load_default(size=14), ImageFont.load_default(size=12)
    ruler = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    high, wide = rows[0].panels[0].shape[:2]
    columns = max(len(row.panels) for row in rows)
    labels = [ruler.textlength(label, small) for row in rows for label in row.labels[1:]]
    step = max(wide, math.ceil(max(labels, default=0))) + GAP
    key = [
        (sample, name)
        for state, sample, name in (
            (KEPT, None, "unchanged: on its own, counted above each picture"),
            (FUSED, tuple(TINT), "fused into a shared token"),
            (DROPPED, (51, 51, 51), "dropped"),
        )
        if state in states
    ]
    key_width = sum(ruler.textlength(name, text) + 2 * GAP + 14 for _, name in key)
    width = max(columns * step + GAP, math.ceil(key_width) + GAP)
    title = fit(ruler, title, text, width - 2 * GAP)
    row_height = 18 + high + 24 + GAP
    image = Image.new("RGB", (width, GAP + 2 * 22 + len(rows) * row_height), PAPER)
    draw = ImageDraw.Draw(image)

    draw.text((GAP, GAP), title, INK, text)
    x = GAP
    for sample, name in key:
        if sample:
            draw.rectangle((x, GAP + 26, x + 11, GAP + 37), sample)
            x += 16
        draw.text((x, GAP + 23), name, GREY, text)
        x += math.ceil(ruler.textlength(name, text)) + 2 * GAP

    for number, row in enumerate(rows):
        top = GAP + 2 * 22 + GAP + number * row_height
        for column, (panel, label) in enumerate(zip(row.panels, row.labels, strict=True)):
            left = GAP + column * step
            draw.text((left, top), fit(draw, label, small, step - GAP), GREY, small)
            image.paste(Image.fromarray(panel), (left, top + 18))
        caption = fit(draw, row.caption, text, width - 2 * GAP)
        draw.text((GAP, top + 18 + high + 3), caption, INK, text)
    return image


def fit(draw: ImageDraw.ImageDraw, line: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """The line, on one line and shortened to at most `width` pixels."""
    line = " ".join(line.split())
    if draw.textlength(line, font) <= width:
        return line
    while line and draw.textlength(line + "...", font) > width:
        line = line[:-1]
    return line + "..."
