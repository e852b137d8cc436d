"""How much of everything: the sizes and speeds of a run, in one place."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from .corpus import SPLIT_SIZES
from .model import MAX_VISUAL_TOKENS
from .training import Stage


BUDGETS = tuple(range(2, MAX_VISUAL_TOKENS + 1, 2))
"""Numbers of visual tokens that are measured."""
FIXED_BUDGETS = (2, 4, 8, 16)
"""Numbers of visual tokens that ordinary models are trained at, to compare with."""
TOWER = Stage(steps=300, batch_size=64, learning_rate=3e-3)
ANSWERS = Stage(steps=3600, batch_size=16, learning_rate=2e-3)


@dataclass(frozen=True)
class Recipe:
    """The sizes that were measured; tests use smaller ones."""

    tower: Stage = TOWER
    answers: Stage = ANSWERS
    split_sizes: Mapping[str, int] = field(default_factory=lambda: dict(SPLIT_SIZES))

    def with_steps(self, steps: int | None) -> "Recipe":
        """
        The same recipe with another number of steps in the answering stage.

        Raises:
            ValueError: if `steps` is not a positive whole number.
        """
        if steps is None:
            return self
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError(f"`steps` must be a whole number from 1 on, got {steps!r}. Leave it out for the recipe's.")
        return replace(self, answers=replace(self.answers, steps=steps))
