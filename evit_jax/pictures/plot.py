# SPDX-License-Identifier: Apache-2.0
"""A plot of labelled points joined by lines, in Pillow.

Drawn at three times its size and reduced, which smooths what Pillow draws with hard edges.
"""

import dataclasses
import itertools
import math

from PIL import Image, ImageDraw, ImageFont

SCALE = 3
SIZE = 880, 520  # of the picture without its legend in pixels, width first
LEFT, RIGHT, TOP, BOTTOM = 84, 36, 52, 66  # around the axes
ROW = 20  # of the legend
MARKER = 5  # radius
INK, GREY, GRID, PAPER = (20, 20, 20), (110, 110, 110), (228, 228, 228), (255, 255, 255)
COLORS = (  # told apart with every kind of color vision, after Okabe and Ito
    (0, 114, 178),
    (213, 94, 0),
    (0, 158, 115),
    (204, 121, 167),
    (230, 159, 0),
    (86, 180, 233),
)
CORNERS = (24, 4, 3)  # of a line's markers, once the colors begin again
FAR_APART = 8.0  # ratio of values that needs an axis in equal ratios

Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclasses.dataclass(frozen=True)
class Line:
    """Points (x, y, what to write beside it), joined in order, perhaps with a bar each."""

    label: str
    points: list[tuple[float, float, str]]
    # (x, y) -> from where to where on the y axis its values were
    bars: dict[tuple[float, float], tuple[float, float]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Axis:
    """A range of values with ticks at both ends and between; evenly spaced or in equal ratios."""

    ticks: tuple[float, ...]
    log: bool = False

    def at(self, value: float) -> float:
        """0 at the first tick to 1 at the last one."""
        scale = math.log if self.log else float
        low, high = scale(self.ticks[0]), scale(self.ticks[-1])
        return (scale(value) - low) / (high - low)


def axis_of(values: list[float], *, even: bool = False) -> Axis:
    """Round ticks around all values, in equal ratios where they are far apart unless `even`."""
    low, high = min(values), max(values)
    if low > 0 and high / low > FAR_APART and not even:
        exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        ticks = [digit * 10.0**exponent for exponent in exponents for digit in (1, 2, 5)]
        first = max(i for i, tick in enumerate(ticks) if tick <= low)
        last = min(i for i, tick in enumerate(ticks) if tick >= high)
        return Axis(tuple(ticks[first : last + 1]), log=True)
    span = (high - low) or abs(high) / 10 or 1.0
    power = 10.0 ** math.floor(math.log10(span / 4))
    step = next(digit * power for digit in (1, 2, 5, 10) if span / (digit * power) <= 7)
    first, last = math.floor((low - span / 20) / step), math.ceil((high + span / 20) / step)
    return Axis(tuple(round(number * step, 12) for number in range(first, last + 1)))


def place(x_axis: Axis, y_axis: Axis, x: float, y: float) -> tuple[float, float]:
    """Where a point is on the picture, in pixels from its left and top."""
    width, height = SIZE[0] - LEFT - RIGHT, SIZE[1] - TOP - BOTTOM
    return LEFT + x_axis.at(x) * width, TOP + (1 - y_axis.at(y)) * height


def font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size=size * SCALE)


def plot(lines: list[Line], *, title: str, x_label: str, y_label: str) -> Image.Image:
    """The picture: title, axes, lines, and under them a legend that makes it higher than SIZE."""
    points = [point for line in lines for point in line.points]
    heights = [y for _, y, _ in points] + [y for line in lines for y in sum(line.bars.values(), ())]
    x_axis, y_axis = axis_of([x for x, _, _ in points]), axis_of(heights)
    names, rows = legend(lines)
    size = SIZE[0], SIZE[1] + rows * ROW + ROW // 2
    image = Image.new("RGB", (size[0] * SCALE, size[1] * SCALE), PAPER)
    draw = ImageDraw.Draw(image)

    draw_axes(image, x_axis, y_axis, x_label, y_label)
    draw.text((LEFT * SCALE, 14 * SCALE), title, INK, font(17))
    for number, (line, (x, y)) in enumerate(zip(lines, names, strict=True)):
        draw_marker(draw, (x + 6, y), number)
        draw.text(((x + 18) * SCALE, y * SCALE), line.label, INK, font(13), anchor="lm")

    taken, boxes, labels = [], [], {}
    for number, line in enumerate(lines):
        color = COLORS[number % len(COLORS)]
        spots = [place(x_axis, y_axis, x, y) for x, y, _ in line.points]
        draw.line([(x * SCALE, y * SCALE) for x, y in spots], color, 2 * SCALE, joint="curve")
        for (x, _), ends in line.bars.items():
            low, high = (place(x_axis, y_axis, x, end) for end in ends)
            draw_bar(draw, low, high, color)
            taken += between(low, high)
        for first, last in itertools.pairwise(spots):
            taken += between(first, last)
        boxes += [(x - MARKER, y - MARKER, x + MARKER, y + MARKER) for x, y in spots]
        for spot, (_, _, text) in zip(spots, line.points, strict=True):
            shared = (spot, text) in labels  # by several lines, so it has none's color
            labels[spot, text] = INK if shared else color
    for number, line in enumerate(lines):
        for x, y, _ in line.points:
            draw_marker(draw, place(x_axis, y_axis, x, y), number)
    for (spot, text), color in labels.items():
        box = free_box(spot, draw.textlength(text, font(12)) / SCALE, taken, boxes)
        boxes.append(box)
        middle = (box[0] + box[2]) / 2 * SCALE, (box[1] + box[3]) / 2 * SCALE
        rim = dict(stroke_width=2 * SCALE, stroke_fill=PAPER)
        draw.text(middle, text, color, font(12), anchor="mm", **rim)
    return image.resize(size, Image.Resampling.LANCZOS)


def legend(lines: list[Line]) -> tuple[list[tuple[float, float]], int]:
    """(where each line's name begins, side by side, and how many rows they take)."""
    x, y, rows, names = float(LEFT), SIZE[1] + ROW / 2, 1, []
    for line in lines:
        width = font(13).getlength(line.label) / SCALE + 44
        if x > LEFT and x + width > SIZE[0] - RIGHT:
            x, y, rows = LEFT, y + ROW, rows + 1
        names.append((x, y))
        x += width
    return names, rows


def draw_axes(image: Image.Image, x_axis: Axis, y_axis: Axis, x_label: str, y_label: str) -> None:
    """Grid, ticks with their values, and what the axes mean."""
    draw, text = ImageDraw.Draw(image), font(12)
    left, right = LEFT * SCALE, (SIZE[0] - RIGHT) * SCALE
    top, bottom = TOP * SCALE, (SIZE[1] - BOTTOM) * SCALE
    for tick in x_axis.ticks:
        x = place(x_axis, y_axis, tick, y_axis.ticks[0])[0] * SCALE
        draw.line((x, top, x, bottom), GRID, SCALE)
        draw.text((x, bottom + 8 * SCALE), f"{tick:,g}", GREY, text, anchor="ma")
    for tick in y_axis.ticks:
        y = place(x_axis, y_axis, x_axis.ticks[0], tick)[1] * SCALE
        draw.line((left, y, right, y), GRID, SCALE)
        draw.text((left - 8 * SCALE, y), f"{tick:,g}", GREY, text, anchor="rm")
    draw.line((left, top, left, bottom, right, bottom), GREY, SCALE)
    where = (left + right) // 2, (SIZE[1] - 14) * SCALE
    draw.text(where, x_label, INK, font(14), anchor="ms")
    width = math.ceil(draw.textlength(y_label, font(14)))
    label = Image.new("RGB", (width, 24 * SCALE), PAPER)
    ImageDraw.Draw(label).text((width // 2, 12 * SCALE), y_label, INK, font(14), anchor="mm")
    label = label.rotate(90, expand=True)
    image.paste(label, (8 * SCALE, (top + bottom - width) // 2))


def draw_marker(draw: ImageDraw.ImageDraw, spot: tuple[float, float], number: int) -> None:
    """The filled marker of line `number`, in a thin white rim."""
    corners = CORNERS[number // len(COLORS) % len(CORNERS)]
    x, y = spot[0] * SCALE, spot[1] * SCALE
    for radius, color in ((MARKER + 2, PAPER), (MARKER, COLORS[number % len(COLORS)])):
        draw.regular_polygon((x, y, radius * SCALE), corners, fill=color)


def draw_bar(
    draw: ImageDraw.ImageDraw,
    low: tuple[float, float],
    high: tuple[float, float],
    color: tuple[int, int, int],
) -> None:
    """An upright bar between two places, with a stroke across each end."""
    x, reach = low[0] * SCALE, (MARKER - 1) * SCALE
    draw.line((x, low[1] * SCALE, x, high[1] * SCALE), color, SCALE)
    for _, y in (low, high):
        draw.line((x - reach, y * SCALE, x + reach, y * SCALE), color, SCALE)


def free_box(
    spot: tuple[float, float],
    width: float,
    taken: list[tuple[float, float]],
    boxes: list[Box],
) -> Box:
    """Where to write so much beside a point: the side with the fewest lines, markers and labels."""
    sides = [(1, -1), (-1, -1), (-1, 1), (1, 1), (0, -1), (0, 1), (1, 0), (-1, 0)]
    height = 13

    def box_at(across: int, down: int) -> Box:
        near = 6 if across and down else 10  # corners of the box are nearer to the point
        left = spot[0] + across * near - width * (1 - across) / 2
        top = spot[1] + down * near - height * (1 - down) / 2
        return left, top, left + width, top + height

    def crowded(box: Box) -> int:
        left, top, right, bottom = box
        inside = sum(left - 3 < x < right + 3 and top - 3 < y < bottom + 3 for x, y in taken)
        over = sum(
            left < other[2] and other[0] < right and top < other[3] and other[1] < bottom
            for other in boxes
        )
        outside = left < LEFT or right > SIZE[0] - 4 or top < TOP - 18 or bottom > SIZE[1] - BOTTOM
        return inside + 100 * (over + outside)

    return min((box_at(*side) for side in sides), key=crowded)


def between(
    first: tuple[float, float], last: tuple[float, float], count: int = 100
) -> list[tuple[float, float]]:
    """Points of a straight line, to keep labels off it."""
    parts = [number / count for number in range(count + 1)]
    (a, b), (c, d) = first, last
    return [(a + (c - a) * part, b + (d - b) * part) for part in parts]
