# SPDX-License-Identifier: Apache-2.0
"""Draws which room of evit_jax imports which: python docs/imports.py docs/imports.png

A box is a file or a folder of evit_jax, with its files and lines of code; a line goes from a room
down to one that it imports. Rooms stand on the floors of tests/test_layout.py, the ground at the
bottom, so a line that went up would show. The last line of standard output counts both.
"""

import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from tests.test_layout import FILES, FLOOR, FLOORS, imported, lines_of_code, part_of  # noqa: E402

SCALE = 2
BOX, GAP, FLOOR_HEIGHT, MARGIN = (104, 44), 34, 104, 24
INK, PAPER, WALL = (30, 30, 30), (255, 255, 255), (243, 240, 232)
COLORS = (
    (0, 114, 178),
    (213, 94, 0),
    (0, 158, 115),
    (204, 121, 167),
    (150, 110, 0),
    (60, 140, 190),
    (120, 80, 160),
    (90, 90, 90),
)


def rooms_and_imports() -> tuple[dict[str, list[Path]], set[tuple[str, str]]]:
    """(room -> its files, pairs of a room and one that it imports)."""
    rooms: dict[str, list[Path]] = {}
    for path in FILES:
        rooms.setdefault(part_of(path), []).append(path)
    rooms["train.py"] = [ROOT / "train.py"]
    pairs = set()
    for room, files in rooms.items():
        for path in files:
            for name in imported(path):
                parts = name.split(".")
                if parts[0] == "evit_jax" and len(parts) > 1 and parts[1] in FLOOR:
                    pairs.add((room, parts[1]))
    return rooms, {(above, below) for above, below in pairs if above != below}


def places(rooms: dict[str, list[Path]]) -> tuple[dict[str, tuple[int, int]], tuple[int, int]]:
    """(room -> center of its box, size of the picture), in pixels."""
    floors = [sorted(floor & rooms.keys()) for floor in FLOORS]
    floors[-1].append("train.py")
    width = max(map(len, floors)) * (BOX[0] + GAP) + 2 * MARGIN
    height = len(floors) * FLOOR_HEIGHT + 2 * MARGIN
    centers = {}
    for number, floor in enumerate(floors):
        y = height - MARGIN - FLOOR_HEIGHT // 2 - number * FLOOR_HEIGHT
        step = (width - 2 * MARGIN) / len(floor)
        # Rooms alone on their floor stand left and right in turn, out of the others' lines.
        shift = (number % 2 * 2 - 1) * width // 4 if len(floor) == 1 and number else 0
        for place, room in enumerate(floor):
            centers[room] = round(MARGIN + (place + 0.5) * step) + shift, y
    return centers, (width, height)


def draw(rooms: dict[str, list[Path]], pairs: set[tuple[str, str]]) -> Image.Image:
    centers, size = places(rooms)
    image = Image.new("RGB", (size[0] * SCALE, size[1] * SCALE), PAPER)
    canvas = ImageDraw.Draw(image)
    for number in range(0, len(FLOORS), 2):
        top = size[1] - MARGIN - (number + 1) * FLOOR_HEIGHT
        box = [0, top * SCALE, size[0] * SCALE, (top + FLOOR_HEIGHT) * SCALE]
        canvas.rectangle(box, WALL)
    for number, room in enumerate(centers):
        below = sorted((b for a, b in pairs if a == room), key=lambda b: centers[b][0])
        color = COLORS[number % len(COLORS)]
        for place, target in enumerate(below):
            (x, y), (to_x, to_y) = centers[room], centers[target]
            x += (place + 1) * BOX[0] / (len(below) + 1) - BOX[0] / 2  # each its own door
            into = sorted((a for a, b in pairs if b == target), key=lambda a: centers[a][0])
            to_x += (into.index(room) + 1) * BOX[0] / (len(into) + 1) - BOX[0] / 2
            line = [x, y + BOX[1] / 2, to_x, to_y - BOX[1] / 2]
            canvas.line([value * SCALE for value in line], color, SCALE)
    for room, (x, y) in centers.items():
        left, top = x - BOX[0] // 2, y - BOX[1] // 2
        box = [left * SCALE, top * SCALE, (left + BOX[0]) * SCALE, (top + BOX[1]) * SCALE]
        canvas.rounded_rectangle(box, 6 * SCALE, PAPER, INK, SCALE)
        count, code = len(rooms[room]), sum(map(lines_of_code, rooms[room]))
        files = f"{count} files, " if count > 1 else ""
        for text, offset, points in ((room, -8, 13), (f"{files}{code} lines", 10, 10)):
            font = ImageFont.load_default(size=points * SCALE)
            canvas.text((x * SCALE, (y + offset) * SCALE), text, INK, font, anchor="mm")
    return image


if __name__ == "__main__":
    rooms, pairs = rooms_and_imports()
    draw(rooms, pairs).save(sys.argv[1], optimize=True)
    upward = [pair for pair in pairs if FLOOR[pair[1]] >= FLOOR.get(pair[0], len(FLOORS))]
    print(f"{len(rooms)} rooms, {len(pairs)} imports, {len(upward)} of them not down")
