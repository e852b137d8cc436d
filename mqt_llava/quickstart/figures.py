"""The pictures of a run: accuracy against the number of visual tokens, samples, and the comparison."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .evaluation import MEAN, Accuracy
from .questions import KINDS
from .samples import SAMPLE_BUDGETS, Sample


# Okabe and Ito's palette, made to be told apart by colour-blind readers.
KIND_COLOURS = dict(
    zip(KINDS, ("#000000", "#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#0072B2", "#D55E00"), strict=True)
)
GREY = "#666666"
RIGHT, WRONG = "#00794F", "#C0392B"
RIGHT_MARK, WRONG_MARK = "\N{CHECK MARK}", "\N{MULTIPLICATION X}"
TITLES = {
    "background": "background colour",
    "dominant": "most common colour",
    "exists": "is there any ...",
    "count": "how many ...",
    "locate": "what is at b3",
    "digit": "which digit at c2",
    "read": "read the number",
    MEAN: "mean of all kinds",
}


def draw_accuracy(accuracy: Accuracy, path: Path) -> None:
    """Accuracy in % against the number of visual tokens: one line per kind, named at its end, and their mean."""
    figure, axes = new_figure(9.0, 5.0)
    budgets = [int(budget) for budget in accuracy[MEAN]]
    for kind, by_budget in accuracy.items():
        style: dict[str, Any] = {"color": "#222222", "linewidth": 3.5, "linestyle": "--", "zorder": 3}
        if kind != MEAN:
            style = {"color": KIND_COLOURS[kind], "linewidth": 2.0, "marker": "o", "markersize": 4.5}
        axes.plot(budgets, percent(by_budget.values()), **style)
    label_ends(axes, budgets[-1], {kind: 100 * list(values.values())[-1] for kind, values in accuracy.items()})
    axes.set(xlabel="visual tokens per image", ylabel="exact match on test scenes (%)", ylim=(-2, 103))
    axes.set_xticks(budgets)
    axes.set_title("One model, any number of visual tokens", loc="left", fontsize=13, fontweight="bold")
    figure.savefig(path, dpi=150)


def label_ends(axes: Axes, at: int, heights: dict[str, float], gap: float = 4.6) -> None:
    """Names every line at its right end. Names that would overlap are moved apart, keeping their order."""
    order = sorted(heights, key=lambda kind: heights[kind], reverse=True)
    placed = spread([heights[kind] for kind in order], gap, top=101.0)
    for kind, height in zip(order, placed):
        colour = KIND_COLOURS.get(kind, "#222222")
        axes.annotate(
            f"{TITLES[kind]}  {heights[kind]:.0f}",
            xy=(at, heights[kind]),
            xytext=(at + 0.9, height),
            color=colour,
            fontsize=10,
            fontweight="bold" if kind == MEAN else "normal",
            va="center",
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "linewidth": 0.6,
                "shrinkA": 2,
                "shrinkB": 4,
                "relpos": (0, 0.5),
            },
        )


def spread(heights: Sequence[float], gap: float, top: float) -> list[float]:
    """Falling `heights`, moved down as far as needed to lie `gap` apart and under `top`."""
    placed: list[float] = []
    for height in heights:
        placed.append(min(height, top, placed[-1] - gap if placed else top))
    return placed


def draw_samples(samples: Sequence[Sample], path: Path) -> None:
    """One row per sample: the picture, the question, and the answers by number of visual tokens."""
    figure = Figure(figsize=(9.0, 1.2 * len(samples) + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(
        len(samples), 2 + len(SAMPLE_BUDGETS), squeeze=False, width_ratios=[1.1, 1.9] + [1.0] * len(SAMPLE_BUDGETS)
    )
    for row, sample in zip(grid, samples):
        row[0].imshow(sample.picture, interpolation="nearest")
        write(row[1], f"{sample.question.text}?", "#222222", sample.question.answer)
        for axes, (_, answer) in zip(row[2:], sample.answers.items()):
            right = answer == sample.question.answer
            write(axes, f"{RIGHT_MARK if right else WRONG_MARK} {answer}", RIGHT if right else WRONG)
    for axes in grid[:, 1:].flat:
        axes.set_axis_off()
    for axes in grid[:, 0]:  # a frame, because a white number plate would run into the page
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_color("#BBBBBB")
    grid[0, 1].set_title("question, right answer", fontsize=10, color=GREY)
    for axes, budget in zip(grid[0, 2:], SAMPLE_BUDGETS):
        axes.set_title(f"{budget} tokens", fontsize=10, color=GREY)
    figure.savefig(path, dpi=150)


def write(axes: Axes, text: str, colour: str, second_line: str | None = None) -> None:
    """Text in the middle of empty axes, with a grey second line if there is one."""
    height = 0.5 if second_line is None else 0.62
    axes.text(0.5, height, text, ha="center", va="center", fontsize=12, color=colour, transform=axes.transAxes)
    if second_line is not None:
        axes.text(0.5, 0.35, second_line, ha="center", va="center", fontsize=11, color=GREY, transform=axes.transAxes)


def draw_comparison(comparison: dict, path: Path) -> None:
    """Small multiples, one per kind: the elastic model, models trained at one length, and one of those cut."""
    figure = Figure(figsize=(11.0, 5.6), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(2, 4, sharex=True, sharey=True)
    for axes, kind in zip(grid.flat, [MEAN, *KINDS]):
        clean(axes)
        lines = draw_contest(axes, comparison, kind)
        axes.set_title(TITLES[kind], loc="left", fontsize=11, fontweight="bold" if kind == MEAN else "normal")
    for axes in grid[:, 0]:
        axes.set(ylabel="exact match (%)", ylim=(-3, 103))
    for axes in grid[-1]:
        axes.set(xlabel="visual tokens per image", xticks=[2, 4, 8, 12, 16])
    figure.legend(handles=lines, loc="outside lower center", ncols=3, frameon=False, fontsize=11)
    figure.savefig(path, dpi=150)


def draw_contest(axes: Axes, comparison: dict, kind: str) -> list:
    """The three contestants at one kind of question. Returns the legend's handles."""
    elastic, cut = comparison["elastic"][kind], comparison["trained_at_all_then_cut"][kind]
    fixed = {budget: by_kind[kind] for budget, by_kind in comparison["fixed"].items()}
    handles = []
    for values, style in (
        (elastic, {"color": "#0072B2", "marker": "o", "linewidth": 2.2, "label": "one elastic model"}),
        (fixed, {"color": "#D55E00", "marker": "D", "linewidth": 0, "label": "trained at this length only"}),
        (cut, {"color": GREY, "marker": ".", "linestyle": ":", "label": "trained at 16 only, then cut"}),
    ):
        handles += axes.plot([int(budget) for budget in values], percent(values.values()), **style)
    return handles


def percent(shares) -> list[float]:
    return [100 * share for share in shares]


def new_figure(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of its own (no global pyplot state) with one clean pair of axes."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    clean(axes)
    return figure, axes


def clean(axes: Axes) -> None:
    """Light grid, no box."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.8)
    axes.set_axisbelow(True)
