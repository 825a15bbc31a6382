# SPDX-License-Identifier: Apache-2.0
"""Two plots over one cost, a quality and a loss in equal ratios, with a line for each method.

It looks like `pictures.plot`, whose axes it draws. Methods are many here, often with points at
nearly the same cost: colors and markers change together, so that each pair of them is one method.
"""

import dataclasses
import itertools
import math

from PIL import Image, ImageDraw

from evit_jax.pictures.plot import (
    BOTTOM,
    COLORS,
    GREY,
    INK,
    LEFT,
    MARKER,
    PAPER,
    RIGHT,
    ROW,
    SCALE,
    SIZE,
    TOP,
    Axis,
    Box,
    axis_of,
    between,
    draw_axes,
    font,
    place,
)

MORE_COLORS = (*COLORS, (122, 72, 28), (106, 61, 154), (70, 70, 70))
# Corners and degrees; as many as do not share a divisor with the colors, so that pairs recur late.
MARKERS = ((24, 0), (4, 0), (3, 0), (4, 45), (3, 180), (5, 0), (6, 0))
MOST_LABELED = 6  # lines that are named where they are; more have a legend
CLOSEST = 0.1  # of the largest cost, the narrowest range of costs to draw
BAND = (214, 214, 214)  # of the frontier
DASHES = ((1, 0), (7, 5), (2, 4))  # drawn and left out, in pixels, by plan


@dataclasses.dataclass(frozen=True)
class Series:
    """A line of points (cost, quality, loss), in order of the cost."""

    label: str
    points: list[tuple[float, float, float]]
    look: int  # number of its color and marker
    plan: int = 0  # 0: drawn through, 1: dashed and hollow, 2: dotted and hollow


def log_axis(values: list[float]) -> Axis:
    """Ticks in equal ratios around all values, which are more than 0."""
    low, high = min(values) / 1.05, max(values) * 1.05
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [digit * 10.0**exponent for exponent in exponents for digit in (1, 2, 5)]
    first = max(i for i, tick in enumerate(ticks) if tick <= low)
    last = min(i for i, tick in enumerate(ticks) if tick >= high)
    return Axis(tuple(ticks[first : last + 1]), log=True)


def cost_axis(values: list[float]) -> Axis:
    """Ticks around all values; those of one budget stay close to each other, as they are."""
    low, high = min(values), max(values)
    missing = max(CLOSEST * high - (high - low), 0) / 2
    return axis_of([low - missing, high + missing])


def picture(
    series: list[Series],
    frontier: list[tuple[float, float]],
    *,
    title: str,
    x_label: str,
    y_labels: tuple[str, str],
    dense: float | None = None,
) -> Image.Image:
    """Quality above, loss below; more than MOST_LABELED lines have a legend at the right.

    Args:
      frontier: (cost, loss) of the points to join by a band, in order of the cost.
      y_labels: of quality and loss.
      dense: a quality to draw a horizontal line at.
    """
    if not series:
        raise ValueError("there is no line to draw")
    x_axis = cost_axis([x for one in series for x, _, _ in one.points])
    qualities = [y for one in series for _, y, _ in one.points]
    y_axis = axis_of([*qualities, *([] if dense is None else [dense])], even=True)
    # A loss of 0, of a plan that reduces nothing, has no place in equal ratios.
    losses = [y for one in series for _, _, y in one.points if y > 0] or [1.0]
    legend = legend_of(series) if len(series) > MOST_LABELED else None

    upper = panel(
        [(one, [(x, y) for x, y, _ in one.points]) for one in series],
        x_axis, y_axis, ("", y_labels[0]), named=legend is None, level=dense,
    )  # fmt: skip
    lower = panel(
        [(one, [(x, y) for x, _, y in one.points if y > 0]) for one in series],
        x_axis, log_axis(losses), (x_label, y_labels[1]), named=legend is None,
        band=[(x, y) for x, y in frontier if y > 0],
    )  # fmt: skip
    above = (SIZE[1] - BOTTOM + 26) * SCALE  # the upper plot's ticks are kept, its label is not
    wide = SIZE[0] * SCALE + (legend.width if legend else 0)
    image = Image.new("RGB", (wide, above + lower.height - (TOP - 24) * SCALE), PAPER)
    image.paste(lower, (0, above - (TOP - 24) * SCALE))
    image.paste(upper.crop((0, 0, upper.width, above)), (0, 0))
    if legend:
        image.paste(legend, (SIZE[0] * SCALE, TOP * SCALE))
    ImageDraw.Draw(image).text((LEFT * SCALE, 14 * SCALE), title, INK, font(17))
    return image.resize((image.width // SCALE, image.height // SCALE), Image.Resampling.LANCZOS)


def panel(
    lines: list[tuple[Series, list[tuple[float, float]]]],
    x_axis: Axis,
    y_axis: Axis,
    labels: tuple[str, str],
    *,
    named: bool,
    level: float | None = None,
    band: list[tuple[float, float]] = (),
) -> Image.Image:
    """One of the two plots, at SCALE times its size.

    Args:
      lines: each with its points (x, y).
      labels: of the axes.
      named: write each line's label beside one of its points.
      level: where to draw the dense model's line.
      band: points of the frontier.
    """
    image = Image.new("RGB", (SIZE[0] * SCALE, SIZE[1] * SCALE), PAPER)
    draw_axes(image, x_axis, y_axis, *labels)
    draw = ImageDraw.Draw(image)
    taken, boxes, texts = [], [], []
    spots = [place(x_axis, y_axis, x, y) for x, y in band]
    if spots:
        draw.line([(x * SCALE, y * SCALE) for x, y in spots], BAND, 9 * SCALE, joint="curve")
        texts.append((spots[-1], "frontier", GREY))
    for spot in spots:
        circle(draw, spot, 9, BAND)
    if level is not None:
        y = place(x_axis, y_axis, x_axis.ticks[0], level)[1]
        ends = (LEFT, y), (SIZE[0] - RIGHT, y)
        dashed(draw, *ends, GREY, (9, 5))
        taken += between(*ends, count=300)
        draw.text(((LEFT + 6) * SCALE, (y - 3) * SCALE), "dense", GREY, font(12), anchor="lb")
        boxes.append((LEFT + 4, y - 18, LEFT + 44, y))
    placed = [(one, [place(x_axis, y_axis, x, y) for x, y in points]) for one, points in lines]
    for one, spots in placed:
        for first, last in itertools.pairwise(spots):
            dashed(draw, first, last, color_of(one), DASHES[one.plan])
            taken += between(first, last)
        boxes += [(x - MARKER, y - MARKER, x + MARKER, y + MARKER) for x, y in spots]
    for one, spots in placed:
        for spot in spots:
            draw_marker(draw, spot, one)
    if named:  # the last point of a line is most often apart from the others'
        texts = [(spots[-1], one.label, color_of(one)) for one, spots in placed if spots] + texts
    for spot, text, color in texts:
        box = clear_box(spot, draw.textlength(text, font(12)) / SCALE, taken, boxes)
        boxes.append(box)
        middle = (box[0] + box[2]) / 2 * SCALE, (box[1] + box[3]) / 2 * SCALE
        rim = dict(stroke_width=2 * SCALE, stroke_fill=PAPER)
        draw.text(middle, text, color, font(12), anchor="mm", **rim)
    return image


def legend_of(series: list[Series]) -> Image.Image:
    """Markers and names below each other, at SCALE times its size."""
    width = 52 + max(font(13).getlength(one.label) for one in series) / SCALE
    image = Image.new("RGB", (math.ceil(width) * SCALE, (len(series) + 1) * ROW * SCALE), PAPER)
    draw = ImageDraw.Draw(image)
    for row, one in enumerate(series):
        y = (row + 0.5) * ROW
        dashed(draw, (0, y), (28, y), color_of(one), DASHES[one.plan])
        draw_marker(draw, (14, y), one)
        draw.text((36 * SCALE, y * SCALE), one.label, INK, font(13), anchor="lm")
    return image


def color_of(one: Series) -> tuple[int, int, int]:
    return MORE_COLORS[one.look % len(MORE_COLORS)]


def draw_marker(draw: ImageDraw.ImageDraw, spot: tuple[float, float], one: Series) -> None:
    """In a thin white rim; hollow unless the line is drawn through."""
    corners, degrees = MARKERS[one.look % len(MARKERS)]
    x, y = spot[0] * SCALE, spot[1] * SCALE
    rings = [(MARKER + 2, PAPER), (MARKER, color_of(one))]
    rings += [(MARKER - 2, PAPER)] if one.plan else []
    for radius, color in rings:
        draw.regular_polygon((x, y, radius * SCALE), corners, degrees, fill=color)


def circle(
    draw: ImageDraw.ImageDraw, spot: tuple[float, float], radius: float, color: tuple[int, int, int]
) -> None:
    x, y, radius = spot[0] * SCALE, spot[1] * SCALE, radius * SCALE
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), color)


def dashed(
    draw: ImageDraw.ImageDraw,
    first: tuple[float, float],
    last: tuple[float, float],
    color: tuple[int, int, int],
    dash: tuple[int, int],
) -> None:
    """A straight line, `dash` pixels drawn and left out in turn."""
    (a, b), (c, d), (on, off) = first, last, dash
    length = math.dist(first, last)
    count = 1 if not off else max(1, math.ceil(length / (on + off)))
    for number in range(count):
        start, end = number / count, (number + on / (on + off)) / count
        ends = [(a + (c - a) * part, b + (d - b) * part) for part in (start, end)]
        draw.line([(x * SCALE, y * SCALE) for x, y in ends], color, 2 * SCALE)


def clear_box(
    spot: tuple[float, float],
    width: float,
    taken: list[tuple[float, float]],
    boxes: list[Box],
) -> Box:
    """Where to write so much near a point: at the nearest place that nothing else is at."""
    height = 13

    def crowded(box: Box) -> int:
        left, top, right, bottom = box
        over = sum(
            left - 6 < other[2] and other[0] < right + 6 and top < other[3] and other[1] < bottom
            for other in boxes
        )
        outside = left < LEFT or right > SIZE[0] - 4 or top < TOP - 18 or bottom > SIZE[1] - BOTTOM
        inside = sum(left - 3 < x < right + 3 and top - 3 < y < bottom + 3 for x, y in taken)
        return 1000 * outside + 100 * over + inside

    tries = []
    for distance in (12, 18, 26, 36, 48):
        for across, down in ((1, 0), (-1, 0), (0, -1), (0, 1), (1, -1), (1, 1), (-1, -1), (-1, 1)):
            near = 0.7 * distance if across and down else distance
            left = spot[0] + across * near - width * (1 - across) / 2
            top = spot[1] + down * near - height * (1 - down) / 2
            tries.append((left, top, left + width, top + height))
    return min(tries, key=lambda box: (crowded(box), tries.index(box)))
