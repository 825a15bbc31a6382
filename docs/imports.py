# SPDX-License-Identifier: Apache-2.0
"""Draws which room of evit_jax imports which: python docs/imports.py docs/imports.png

A box is a file or a folder of evit_jax, with its files and lines of code; a line goes from a room
down to one that it imports. Rooms stand on the floors of tests/test_layout.py, the ground at the
bottom, so a line that went up would show. The last line of standard output counts both.
"""

import ast
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from tests.test_layout import FILES, FLOOR, FLOORS, imported, lines_of_code, part_of  # noqa: E402

SCALE = 2
BOX, GAP, FLOOR_HEIGHT, MARGIN = (104, 44), 34, 104, 24
INK, PAPER, WALL = (30, 30, 30), (255, 255, 255), (243, 240, 232)
COLOURS = (
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
    """(room -> centre of its box, size of the picture), in pixels."""
    floors = [sorted(floor & rooms.keys()) for floor in FLOORS]
    floors[-1].append("train.py")
    width = max(map(len, floors)) * (BOX[0] + GAP) + 2 * MARGIN
    height = len(floors) * FLOOR_HEIGHT + 2 * MARGIN
    centres = {}
    for number, floor in enumerate(floors):
        y = height - MARGIN - FLOOR_HEIGHT // 2 - number * FLOOR_HEIGHT
        step = (width - 2 * MARGIN) / len(floor)
        for place, room in enumerate(floor):
            # Floors with few rooms are shifted a little, so that lines do not run through boxes.
            shift = (number % 2 * 2 - 1) * GAP / 2 if len(floor) < 4 else 0
            centres[room] = round(MARGIN + (place + 0.5) * step + shift), y
    return centres, (width, height)


def draw(rooms: dict[str, list[Path]], pairs: set[tuple[str, str]]) -> Image.Image:
    centres, size = places(rooms)
    image = Image.new("RGB", (size[0] * SCALE, size[1] * SCALE), PAPER)
    canvas = ImageDraw.Draw(image)
    for number in range(0, len(FLOORS), 2):
        top = size[1] - MARGIN - (number + 1) * FLOOR_HEIGHT
        box = [0, top * SCALE, size[0] * SCALE, (top + FLOOR_HEIGHT) * SCALE]
        canvas.rectangle(box, WALL)
    for number, room in enumerate(centres):
        below = sorted((b for a, b in pairs if a == room), key=lambda b: centres[b][0])
        colour = COLOURS[number % len(COLOURS)]
        for place, target in enumerate(below):
            (x, y), (to_x, to_y) = centres[room], centres[target]
            x += (place + 1) * BOX[0] / (len(below) + 1) - BOX[0] / 2  # each its own door
            into = sorted((a for a, b in pairs if b == target), key=lambda a: centres[a][0])
            to_x += (into.index(room) + 1) * BOX[0] / (len(into) + 1) - BOX[0] / 2
            line = [x, y + BOX[1] / 2, to_x, to_y - BOX[1] / 2]
            canvas.line([value * SCALE for value in line], colour, SCALE)
    for room, (x, y) in centres.items():
        left, top = x - BOX[0] // 2, y - BOX[1] // 2
        box = [left * SCALE, top * SCALE, (left + BOX[0]) * SCALE, (top + BOX[1]) * SCALE]
        canvas.rounded_rectangle(box, 6 * SCALE, PAPER, INK, SCALE)
        count, code = len(rooms[room]), sum(map(lines_of_code, rooms[room]))
        files = f"{count} files, " if count > 1 else ""
        for text, offset, points in ((room, -8, 13), (f"{files}{code} lines", 10, 10)):
            font = ImageFont.load_default(size=points * SCALE)
            canvas.text((x * SCALE, (y + offset) * SCALE), text, INK, font, anchor="mm")
    return image


def longest_functions(count: int) -> list[tuple[int, str]]:
    """(lines, file and name) of the functions with the most lines, docstrings among them."""
    found = []
    for path in [*FILES, ROOT / "train.py"]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                lines = node.end_lineno - node.lineno + 1
                found.append((lines, f"{path.relative_to(ROOT)}:{node.name}"))
    return sorted(found, reverse=True)[:count]


if __name__ == "__main__":
    rooms, pairs = rooms_and_imports()
    draw(rooms, pairs).save(sys.argv[1], optimize=True)
    for lines, name in longest_functions(10):
        print(f"{lines:4} {name}")
    upward = [pair for pair in pairs if FLOOR[pair[1]] >= FLOOR.get(pair[0], len(FLOORS))]
    print(f"{len(rooms)} rooms, {len(pairs)} imports, {len(upward)} of them not down")
