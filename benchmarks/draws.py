"""
Which draw of the number of visual tokens, and whether self-distillation, brings an elastic model closest to models
trained at one number: on the quickstart's corpus, from its starting values, for one and the same number of passes.

    python benchmarks/draws.py --seeds 0 1 2 --jobs 2

Everything lies under `--output-dir`; what is there already is not done again, so an interrupted benchmark goes on where
it stopped. Prints the table and leaves `draws.json` and `draws.png` beside it. Hours on two cores.
"""

import argparse
import json
import multiprocessing
import os
import statistics
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure
from tqdm import tqdm

from mqt_llava import MqtLlavaForConditionalGeneration
from mqt_llava.quickstart import Recipe, run_quickstart
from mqt_llava.quickstart.answering import FULL_LENGTH_SHARE, elastic_draw
from mqt_llava.quickstart.evaluation import MEAN
from mqt_llava.quickstart.figures import clean
from mqt_llava.quickstart.folder import OutputFolder, read_json, write_json
from mqt_llava.quickstart.recipe import BUDGETS
from mqt_llava.quickstart.run import Run, one_thread, quiet_transformers


@dataclass(frozen=True)
class Contestant:
    """A way to train an elastic model."""

    name: str
    draw: str
    passes: float = 1
    """Forward and backward passes of a step, once budgets are drawn."""
    self_distillation: float = 0.0

    def steps(self, total_passes: int) -> int:
        """As many steps as make so many passes in all."""
        return round(total_passes / (FULL_LENGTH_SHARE + (1 - FULL_LENGTH_SHARE) * self.passes))


UNIFORM = "uniform"  # what the quickstart itself trains
CONTESTANTS = (
    Contestant("log_uniform", "log_uniform"),
    Contestant("sandwich", "sandwich", passes=3),
    # The teacher's pass has no backward, which is two thirds of a pass.
    Contestant("uniform, self_distillation 1", "uniform", passes=4 / 3, self_distillation=1.0),
    Contestant("all_of(2, 4, 8, 16)", "all_of(2, 4, 8, 16)", passes=4),
    Contestant("uniform_all", "uniform_all"),
)
FIXED = "trained at m only"


def elastic(folder: Path, seed: int) -> None:
    """The quickstart's model, whose tower all others share."""
    run_quickstart(folder / "quickstart", seed=seed)


def fixed(folder: Path, seed: int) -> None:
    """Models trained at one number."""
    run_quickstart(folder / "quickstart", seed=seed, compare=True)


def contest(folder: Path, seed: int, contestant: Contestant) -> None:
    """Another elastic model, measured on the same test scenes."""
    own = OutputFolder(folder / contestant.name)
    if own.is_finished:
        return
    recipe = Recipe()
    recipe = recipe.with_steps(contestant.steps(recipe.answers.steps))
    own.open({"seed": seed, "steps": recipe.answers.steps}, overwrite=False)
    tower = MqtLlavaForConditionalGeneration.from_pretrained(folder / "quickstart").model.vision_tower
    with quiet_transformers(), one_thread():
        run = Run(own, seed, recipe, lambda line: None)
        draw = elastic_draw(recipe.answers.steps, contestant.draw)
        model = run.train_beside(tower, "answers", draw, contestant.self_distillation)
        write_json(own.results, {"accuracy": run.measure(model, run.corpus["test"], BUDGETS)})
    own.close()


def carry_out(folders: dict[int, Path], jobs: int) -> None:
    """Everything that is not done yet, several at a time, each on one thread."""
    os.environ["TQDM_DISABLE"] = "1"  # of the processes below: one bar is enough
    rest = [(fixed,), *((contest, contestant) for contestant in CONTESTANTS)]  # the longest first
    rounds = [
        [(elastic, folder, seed) for seed, folder in folders.items()],
        [(task, folder, seed, *more) for task, *more in rest for seed, folder in folders.items()],
    ]
    total = sum(map(len, rounds))
    with (
        ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool,
        tqdm(total=total, desc="training", disable=False) as bar,
    ):
        for tasks in rounds:
            for future in as_completed([pool.submit(*task) for task in tasks]):
                future.result()
                bar.update()


def read_accuracies(folder: Path) -> dict[str, dict[str, float]]:
    """Contestant -> number of visual tokens, as text -> mean accuracy, for one seed."""
    comparison = read_json(folder / "quickstart" / "comparison.json")
    return {
        FIXED: {budget: by_kind[MEAN] for budget, by_kind in comparison["fixed"].items()},
        UNIFORM: comparison["elastic"][MEAN],
        **{one.name: read_json(folder / one.name / "results.json")["accuracy"][MEAN] for one in CONTESTANTS},
    }


def over_seeds(by_seed: dict[int, dict[str, dict[str, float]]]) -> dict[str, dict[str, list[float]]]:
    """Contestant -> number of visual tokens -> accuracy in % of each seed."""
    first = next(iter(by_seed.values()))
    return {
        name: {budget: [100 * found[name][budget] for found in by_seed.values()] for budget in accuracy}
        for name, accuracy in first.items()
    }


def table(accuracies: dict[str, dict[str, list[float]]]) -> str:
    """Markdown: mean over the seeds and, in brackets, the lowest and the highest."""
    budgets = [str(budget) for budget in BUDGETS]
    lines = ["| trained with | " + " | ".join(budgets) + " |", "|---|" + "---:|" * len(budgets)]
    for name, by_budget in accuracies.items():
        cells = [cell(by_budget[budget]) if budget in by_budget else "" for budget in budgets]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cell(values: list[float]) -> str:
    return f"{statistics.mean(values):.1f} ({min(values):.0f}–{max(values):.0f})"  # noqa: RUF001


def plot(accuracies: dict[str, dict[str, list[float]]], path: Path) -> None:
    """Mean accuracy against the number of visual tokens, one line per contestant."""
    figure = Figure(figsize=(9.0, 5.0), layout="constrained")
    axes = figure.subplots()
    clean(axes)
    for name, by_budget in accuracies.items():
        style = {"color": "#222222", "marker": "D", "linewidth": 0} if name == FIXED else {"marker": "o"}
        means = [statistics.mean(values) for values in by_budget.values()]
        axes.plot([int(budget) for budget in by_budget], means, label=name, **style)
    axes.set(xlabel="visual tokens per image", ylabel="exact match on test scenes (%)", xticks=BUDGETS)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="models trained at a time, a core each")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/draws"))
    args = parser.parse_args()
    folders = {seed: args.output_dir / f"seed-{seed}" for seed in args.seeds}
    carry_out(folders, args.jobs)
    accuracies = over_seeds({seed: read_accuracies(folder) for seed, folder in folders.items()})
    (args.output_dir / "draws.json").write_text(json.dumps(accuracies, indent=2) + "\n")
    plot(accuracies, args.output_dir / "draws.png")
    print(table(accuracies))


if __name__ == "__main__":
    main()
