"""What a scene holds, how one is drawn at random, and its picture.

A scene is a grid of 4 x 4 cells, named like a chess board: column letter, row number, `a1` top left. One row is a white
plate with four digits; every other cell is empty or holds one shape in one colour.
"""

from dataclasses import dataclass

import numpy as np


SIDE = 4
CELL = 16
IMAGE_SIZE = SIDE * CELL

BACKGROUNDS = {"black": (25, 25, 30), "grey": (125, 125, 130), "pink": (250, 190, 205), "teal": (30, 120, 120)}
COLOURS = {
    "red": (215, 40, 40),
    "green": (50, 175, 60),
    "blue": (50, 80, 230),
    "yellow": (245, 220, 40),
    "purple": (165, 60, 205),
    "orange": (245, 140, 30),
}
SHAPES = ("circle", "square", "triangle", "cross")
NOTHING = "nothing"
CELL_NAMES = tuple(f"{column}{row}" for row in range(1, SIDE + 1) for column in "abcd")

PLATE = (250, 250, 250)
INK = (10, 10, 10)
COLOUR_JITTER = 15
DIGIT_ROWS = (  # 5 x 7 dots, one string per digit, rows separated by blanks
    "01110 10001 10011 10101 11001 10001 01110",
    "00100 01100 00100 00100 00100 00100 01110",
    "01110 10001 00001 00110 01000 10000 11111",
    "11110 00001 00001 01110 00001 00001 11110",
    "00010 00110 01010 10010 11111 00010 00010",
    "11111 10000 11110 00001 00001 10001 01110",
    "00110 01000 10000 11110 10001 10001 01110",
    "11111 00001 00010 00100 01000 01000 01000",
    "01110 10001 10001 01110 10001 10001 01110",
    "01110 10001 10001 01111 00001 00010 01100",
)


@dataclass(frozen=True)
class Scene:
    """One scene. The three grids are `(4, 4)` integers, 0 where the cell has no such thing."""

    background: int
    """Index into `BACKGROUNDS`."""
    shapes: np.ndarray
    """1 + index into `SHAPES`."""
    colours: np.ndarray
    """1 + index into `COLOURS`, of the shape in the cell."""
    digits: np.ndarray
    """1 + the digit; not 0 in exactly one row."""

    @property
    def key(self) -> bytes:
        """Equal for two scenes exactly when they hold the same things in the same places."""
        return np.concatenate([[self.background], *self.shapes, *self.colours, *self.digits]).tobytes()

    @property
    def plate_row(self) -> int:
        """Row, from 0, of the plate with the number."""
        return int(self.digits.any(axis=1).argmax())

    @property
    def number(self) -> str:
        """The four digits on the plate, as `"4 0 7 1"`: one word per digit."""
        return " ".join(str(digit - 1) for digit in self.digits[self.plate_row])


def draw_scene(rng: np.random.Generator) -> Scene:
    """A scene at random: 6 to 10 shapes, one colour strictly the most common, the plate in any row."""
    colours = draw_colours(rng)
    shapes = 1 + rng.choice(len(SHAPES), size=len(colours), p=rng.dirichlet(np.ones(len(SHAPES))))
    plate_row = int(rng.integers(SIDE))
    free = np.flatnonzero(np.arange(SIDE * SIDE) // SIDE != plate_row)
    cells = rng.choice(free, size=len(colours), replace=False)

    grids = np.zeros((3, SIDE * SIDE), dtype=np.int64)
    grids[0, cells], grids[1, cells] = shapes, colours
    grids[2, plate_row * SIDE : (plate_row + 1) * SIDE] = 1 + rng.integers(10, size=SIDE)
    return Scene(int(rng.integers(len(BACKGROUNDS))), *grids.reshape(3, SIDE, SIDE))


def draw_colours(rng: np.random.Generator) -> np.ndarray:
    """Colours (from 1) of 6 to 10 shapes, in no order: every colour is as likely as another to be the most common."""
    most_common, most = rng.integers(len(COLOURS)), int(rng.integers(3, 6))
    counts = np.zeros(len(COLOURS), dtype=np.int64)
    counts[most_common] = most
    others = np.delete(np.arange(len(COLOURS)), most_common)
    for _ in range(rng.integers(6, 11) - most):
        counts[rng.choice(others[counts[others] < most - 1])] += 1
    return 1 + np.repeat(np.arange(len(COLOURS)), counts)


def render(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """`(64, 64, 3)` picture, uint8. Sizes, places and colours jitter, so no two pictures of one scene are alike."""
    picture = np.empty((IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    picture[:] = jittered(tuple(BACKGROUNDS.values())[scene.background], rng)
    top = scene.plate_row * CELL
    picture[top : top + CELL] = PLATE
    palette = tuple(COLOURS.values())
    for row, column in np.argwhere(scene.shapes):
        mask = shape_mask(SHAPES[scene.shapes[row, column] - 1], rng)
        cell_of(picture, row, column)[mask] = jittered(palette[scene.colours[row, column] - 1], rng)
    for column, digit in enumerate(scene.digits[scene.plate_row] - 1):
        cell_of(picture, scene.plate_row, column)[digit_mask(digit, rng)] = INK
    return picture


def cell_of(picture: np.ndarray, row: int, column: int) -> np.ndarray:
    """The `(16, 16, 3)` view of one cell."""
    return picture[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL]


def jittered(colour: tuple[int, int, int], rng: np.random.Generator) -> np.ndarray:
    return np.clip(np.array(colour) + rng.integers(-COLOUR_JITTER, COLOUR_JITTER + 1, size=3), 0, 255)


def shape_mask(shape: str, rng: np.random.Generator) -> np.ndarray:
    """`(16, 16)` bool: the pixels of one shape, 9 to 13 wide, up to one pixel off the middle of its cell."""
    half = rng.uniform(4.5, 6.5)
    middle = (CELL - 1) / 2 + rng.integers(-1, 2, size=2)
    y, x = (np.arange(CELL) - middle[0])[:, None], (np.arange(CELL) - middle[1])[None, :]
    if shape == "circle":
        return y**2 + x**2 <= half**2
    if shape == "square":
        return (abs(y) <= half) & (abs(x) <= half)
    if shape == "triangle":  # point up
        return (abs(y) <= half) & (2 * abs(x) <= y + half)
    arm = half / 3
    return (abs(y) <= half) & (abs(x) <= half) & ((abs(y) <= arm) | (abs(x) <= arm))


def digit_mask(digit: int, rng: np.random.Generator) -> np.ndarray:
    """`(16, 16)` bool: one digit of 10 x 14 pixels, up to one pixel off the middle of its cell."""
    dots = np.array([[dot == "1" for dot in row] for row in DIGIT_ROWS[digit].split()])
    mask = np.zeros((CELL, CELL), dtype=bool)
    top, left = 1 + rng.integers(-1, 2), 3 + rng.integers(-1, 2)
    mask[top : top + 14, left : left + 10] = dots.repeat(2, axis=0).repeat(2, axis=1)
    return mask
