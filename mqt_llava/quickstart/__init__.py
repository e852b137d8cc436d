"""A tiny elastic model from nothing, in minutes on a CPU: rendered scenes, questions about them, training, figures."""

from .recipe import Recipe
from .run import run_quickstart


__all__ = ["Recipe", "run_quickstart"]
