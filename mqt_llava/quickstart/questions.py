"""What can be asked about a scene, and how questions are chosen so that guessing does not pay."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from .scenes import BACKGROUNDS, CELL_NAMES, COLOURS, NOTHING, SHAPES, SIDE, Scene


MOST_COUNTED = 4
"""A count above this is not asked: such scenes are too rare to balance."""
PLURALS = ("circles", "squares", "triangles", "crosses")
"""`SHAPES` as a question about their number names them."""


@dataclass(frozen=True)
class Question:
    kind: str
    text: str
    """The word that matters comes last: the answer is then one look at the picture away."""
    answer: str


def background(scene: Scene) -> Iterator[Question]:
    yield Question("background", "which background", tuple(BACKGROUNDS)[scene.background])


def dominant(scene: Scene) -> Iterator[Question]:
    counts = colour_counts(scene)
    yield Question("dominant", "which colour most", max(counts, key=counts.__getitem__))


def exists(scene: Scene) -> Iterator[Question]:
    for colour, count in colour_counts(scene).items():
        yield Question("exists", f"any {colour}", "yes" if count else "no")


def count(scene: Scene) -> Iterator[Question]:
    for word, number in {**shape_counts(scene), **colour_counts(scene)}.items():
        if number <= MOST_COUNTED:
            yield Question("count", f"how many {word}", str(number))


def locate(scene: Scene) -> Iterator[Question]:
    for row, column in np.ndindex(SIDE, SIDE):
        if row != scene.plate_row:
            name = CELL_NAMES[row * SIDE + column]
            yield Question("locate", f"which shape at {name}", (NOTHING, *SHAPES)[scene.shapes[row, column]])
            yield Question("locate", f"which colour at {name}", (NOTHING, *COLOURS)[scene.colours[row, column]])


def digit(scene: Scene) -> Iterator[Question]:
    row = scene.plate_row
    for column, value in enumerate(scene.digits[row] - 1):
        yield Question("digit", f"which digit at {CELL_NAMES[row * SIDE + column]}", str(value))


def read(scene: Scene) -> Iterator[Question]:
    yield Question("read", "read the number", scene.number)


def colour_counts(scene: Scene) -> dict[str, int]:
    return {name: int((scene.colours == index).sum()) for index, name in enumerate(COLOURS, start=1)}


def shape_counts(scene: Scene) -> dict[str, int]:
    return {name: int((scene.shapes == index).sum()) for index, name in enumerate(PLURALS, start=1)}


KINDS: dict[str, Callable[[Scene], Iterator[Question]]] = {
    "background": background,
    "dominant": dominant,
    "exists": exists,
    "count": count,
    "locate": locate,
    "digit": digit,
    "read": read,
}
"""Kind -> every question of that kind that a scene allows. From coarse to fine."""


class BalancedAsker:
    """
    Asks the questions whose pair of question and answer was asked least so far, ties broken at random.

    A reader of the questions alone then gains little: over many scenes each answer to each question is equally common,
    as far as the scenes allow.
    """

    def __init__(self, rng: np.random.Generator):
        self.rng = rng
        self.asked: Counter[tuple[str, str]] = Counter()

    def ask(self, scene: Scene, kind: str, number: int) -> list[Question]:
        """`number` different questions of one `kind`; all of them if the scene allows fewer."""
        candidates = list(KINDS[kind](scene))
        ties = self.rng.permutation(len(candidates))
        asked = [self.asked[question.text, question.answer] for question in candidates]
        order = sorted(range(len(candidates)), key=lambda index: (asked[index], ties[index]))
        chosen = [candidates[index] for index in order[:number]]
        self.asked.update((question.text, question.answer) for question in chosen)
        return chosen
