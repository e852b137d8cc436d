"""Curves of a run."""

from collections.abc import Sequence
from typing import Any


PREFIX = "eval_loss@"


def budget_curves(log_history: Sequence[dict[str, Any]]) -> dict[int, list[tuple[int, float]]]:
    """Budget -> (step, loss), as logged; the last entry of a step counts."""
    curves: dict[int, dict[int, float]] = {}
    for entry in log_history:
        for key, value in entry.items():
            if key.startswith(PREFIX):
                curves.setdefault(int(key.removeprefix(PREFIX)), {})[entry["step"]] = value
    return {budget: sorted(points.items()) for budget, points in sorted(curves.items())}


def plot_budgets(log_history: Sequence[dict[str, Any]], path: str) -> None:
    """A PNG with the evaluation loss over the steps, one curve per budget."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for budget, points in budget_curves(log_history).items():
        axes.plot(*zip(*points), marker="o", markersize=3, label=f"{budget}")
    axes.set(xlabel="optimizer step", ylabel="evaluation loss per label")
    axes.legend(title="visual tokens")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
