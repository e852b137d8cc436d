"""A quickstart run from start to end: render, teach, measure, draw, save."""

import contextlib
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch
import transformers
from PIL import Image
from torch import nn
from tqdm.auto import tqdm

from .._version import __version__
from ..modeling_mqt_llava import MqtLlavaForConditionalGeneration
from ..processing_mqt_llava import MqtLlavaProcessor
from ..training.draws import Draw
from .answering import Tokens, elastic_draw, fixed_draw, patches_of, teach_to_answer, training_visits
from .baselines import blind_accuracy, majority_accuracy
from .corpus import Split, build_corpus
from .evaluation import MEAN, Accuracy, measure_accuracy
from .figures import draw_accuracy, draw_comparison, draw_samples
from .folder import OutputFolder, read_json, write_json
from .model import MAX_VISUAL_TOKENS, build_model, build_processor
from .recipe import BUDGETS, FIXED_BUDGETS, Recipe
from .samples import collect_samples
from .tower import seen_correctly, teach_to_see


Echo = Callable[[str], None]


def run_quickstart(
    output_dir: str | Path = "runs/quickstart",
    seed: int = 0,
    steps: int | None = None,
    compare: bool = False,
    overwrite: bool = False,
    echo: Echo = lambda line: None,
    recipe: Recipe | None = None,
) -> dict:
    """
    Renders a visual question answering corpus, trains one tiny elastic model on it and shows how accuracy grows with
    the number of visual tokens. Minutes on two CPU cores.

    Writes to `output_dir`: the model and its processor as a normal checkpoint, `results.json`, `accuracy.png`,
    `samples.png` and a test scene to ask about, `scene.png`; with `compare` also `comparison.json` and
    `comparison.png`. An interrupted run goes on where it stopped when called again with the same arguments. A finished
    run is not done again: its results are shown.

    Args:
        output_dir (`str` or `Path`): new, empty, or with an earlier run.
        seed (`int`): decides the corpus, the starting values and every draw.
        steps (`int`, *optional*): optimizer steps of the answering stage, instead of the recipe's.
        compare (`bool`): also train one ordinary model for each number in `FIXED_BUDGETS`, with the same steps.
        overwrite (`bool`): throw an earlier run in `output_dir` away.
        echo (callable): told, line by line, what happens and what came out.
        recipe ([`Recipe`], *optional*): sizes other than the measured ones.

    Returns:
        `dict`: the content of `results.json`.

    Raises:
        ValueError: if an argument is out of range, or `output_dir` holds another run or other files.
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise ValueError(f"`seed` must be a whole number from 0 to {2**32 - 1}, got {seed!r}.")
    recipe = (recipe or Recipe()).with_steps(steps)
    folder = OutputFolder(output_dir)
    folder.open({"seed": seed, **asdict(recipe)}, overwrite)
    if folder.is_finished and (folder.is_compared or not compare):
        echo(f"{folder.path} holds this run already, finished. Its results (run with --overwrite to do it again):")
    else:
        with quiet_transformers(), one_thread():
            Run(folder, seed, recipe, echo).carry_out(compare)
    folder.close()
    return show_results(folder, echo)


class Run:
    """One run under way: what all its stages share."""

    def __init__(self, folder: OutputFolder, seed: int, recipe: Recipe, echo: Echo):
        self.folder, self.seed, self.recipe, self.echo = folder, seed, recipe, echo
        self.started = time.monotonic() - (read_json(folder.seconds)["seconds"] if folder.seconds.exists() else 0.0)
        self.processor: MqtLlavaProcessor = build_processor()
        self.tokens = Tokens(self.processor.tokenizer)
        self.echo("Rendering scenes and asking questions ...")
        self.corpus = build_corpus(seed, recipe.split_sizes)

    def carry_out(self, compare: bool) -> None:
        """Everything that is not done yet."""
        if not self.folder.is_finished:
            self.train_and_measure()
        if compare and not self.folder.is_compared:
            self.compare()

    def train_and_measure(self) -> None:
        """The elastic model, its checkpoint, results and figures."""
        model = self.new_model()
        self.teach_tower(model)
        self.echo(
            "Teaching the model to answer, at first with all visual tokens, then with a number drawn at every step ..."
        )
        self.teach_answers(model, "elastic", elastic_draw(self.recipe.answers.steps))
        accuracy = self.measure(model, self.corpus["test"], BUDGETS)
        model.save_pretrained(self.folder.path)
        self.processor.save_pretrained(self.folder.path)
        draw_accuracy(accuracy, self.folder.path / "accuracy.png")
        draw_samples(collect_samples(model, self.processor, self.corpus["test"]), self.folder.path / "samples.png")
        Image.fromarray(self.corpus["test"].pictures[0]).save(self.folder.path / "scene.png")
        write_json(self.folder.results, self.results(accuracy))

    def new_model(self) -> MqtLlavaForConditionalGeneration:
        """A model whose starting values depend on the seed alone."""
        torch.manual_seed(self.seed)
        return build_model()

    def teach_tower(self, model: MqtLlavaForConditionalGeneration) -> None:
        """The stand-in for CLIP's pre-training."""
        self.echo(
            "Teaching the vision tower to see: a stand-in for CLIP's pre-training, with the renderer's own labels ..."
        )
        with self.bar("seeing", self.recipe.tower.steps) as on_step:
            seeing = teach_to_see(
                model.model.vision_tower,
                self.recipe.tower,
                self.corpus["train"],
                self.folder.work / "tower",
                self.seed,
                on_step,
            )
        shares = seen_correctly(seeing, self.corpus["validation"])
        self.echo("Patches named right: " + ", ".join(f"{name} {share:.1%}" for name, share in shares.items()))

    def teach_answers(
        self, model: MqtLlavaForConditionalGeneration, name: str, draw: Draw, self_distillation: float = 0.0
    ) -> None:
        """Query transformer and language model learn, on all questions in one order, whatever is drawn."""
        stage, train, folder = self.recipe.answers, self.corpus["train"], self.folder.work / name
        visits = training_visits(train, patches_of(model, train), self.tokens, stage, self.seed)
        with self.bar(f"answering, {name}", stage.steps) as on_step:
            teach_to_answer(model, stage, visits, draw, folder, self.seed, on_step, self_distillation)

    def measure(self, model: MqtLlavaForConditionalGeneration, split: Split, budgets) -> Accuracy:
        """Accuracy on a split, under a progress bar."""
        with self.bar("measuring", len(split)) as on_scenes:
            return measure_accuracy(model, split, self.tokens, budgets, on_scenes)

    def compare(self) -> None:
        """Ordinary models, each trained at one number of visual tokens; the last one is also cut to fewer."""
        elastic = read_json(self.folder.results)["accuracy"]
        tower = MqtLlavaForConditionalGeneration.from_pretrained(self.folder.path).model.vision_tower
        fixed: dict[str, dict[str, float]] = {}
        truncated: Accuracy = {}
        for budget in FIXED_BUDGETS:
            self.echo(f"Training an ordinary model with {budget} visual tokens at every step ...")
            model = self.train_beside(tower, f"fixed-{budget}", fixed_draw(budget))
            everything = budget == MAX_VISUAL_TOKENS
            accuracy = self.measure(model, self.corpus["test"], BUDGETS if everything else [budget])
            fixed[str(budget)] = {kind: by_budget[str(budget)] for kind, by_budget in accuracy.items()}
            truncated = accuracy if everything else truncated
        comparison = {"elastic": elastic, "fixed": fixed, "trained_at_all_then_cut": truncated}
        draw_comparison(comparison, self.folder.path / "comparison.png")
        write_json(self.folder.comparison, comparison)

    def train_beside(
        self, tower: nn.Module, name: str, draw: Draw, self_distillation: float = 0.0
    ) -> MqtLlavaForConditionalGeneration:
        """A model of the same starting values, tower and questions as the elastic one, at another draw."""
        model = self.new_model()
        model.model.vision_tower.load_state_dict(tower.state_dict())
        self.teach_answers(model, name, draw, self_distillation)
        return model

    def results(self, accuracy: Accuracy) -> dict:
        """The content of `results.json`."""
        train, test = (self.corpus[name].all_questions() for name in ("train", "test"))
        return {
            "seed": self.seed,
            "seconds": round(time.monotonic() - self.started, 1),
            "budgets": list(BUDGETS),
            "accuracy": accuracy,
            "majority": majority_accuracy(train, test),
            "blind": blind_accuracy(train, test),
            "versions": {
                "mqt_llava": __version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "python": platform.python_version(),
            },
        }

    @contextlib.contextmanager
    def bar(self, name: str, total: int) -> Iterator[Callable[[int], None]]:
        """A progress bar, moved by telling how much is done. The time spent so far is noted on the way."""
        with tqdm(total=total, desc=name, dynamic_ncols=True) as bar:

            def on_step(done: int) -> None:
                bar.update(done - bar.n)
                write_json(self.folder.seconds, {"seconds": time.monotonic() - self.started})

            yield on_step


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without the library's own bars and notes on every file it writes or loads, which would cut our bar in two."""
    shown, verbosity = transformers.logging.is_progress_bar_enabled(), transformers.logging.get_verbosity()
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        if shown:
            transformers.logging.enable_progress_bar()


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """
    Torch on one core. Two are faster by a quarter on a machine that does nothing else, and slower by ten times and more
    as soon as another program wants a core, because each of the many small steps then waits for the later thread.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def show_results(folder: OutputFolder, echo: Echo) -> dict:
    """Echoes the table and what to do next."""
    results = read_json(folder.results)
    for line in accuracy_table(results):
        echo(line)
    echo(f"Test scenes, exact match in %. {results['seconds']:.0f} seconds in all. Figures: {folder.path}/*.png")
    if folder.is_compared:
        for line in comparison_table(read_json(folder.comparison)):
            echo(line)
    echo("Next:")
    path, command = folder.path, command_name()
    echo(f"  {command} ask {path}/scene.png 'read the number' --model {path} --num-visual-tokens 2,4,16")
    if not folder.is_compared:
        echo(f"  {command} quickstart --output-dir {path} --compare   # beside models trained at one length")
    return results


def command_name() -> str:
    """`mqt-llava`, or the way to it where the shell finds none, as without an active environment."""
    if shutil.which("mqt-llava"):
        return "mqt-llava"
    return os.path.relpath(Path(sys.executable).parent / "mqt-llava")


def accuracy_table(results: dict) -> list[str]:
    """One line per kind: accuracy in % at every budget, then what guessing gives."""
    budgets = [str(budget) for budget in results["budgets"]]
    lines = [f"{'m':<12}" + "".join(f"{budget:>6}" for budget in budgets) + "   majority  blind"]
    for kind, by_budget in results["accuracy"].items():
        guesses = "" if kind == MEAN else f"{results['majority'][kind]:11.1%}{results['blind'][kind]:7.1%}"
        cells = "".join(f"{100 * by_budget[budget]:6.1f}" for budget in budgets)
        lines.append(f"{kind:<12}{cells}{guesses}")
    return lines


def comparison_table(comparison: dict) -> list[str]:
    """Mean accuracy in % of the elastic model, of models trained at one length, and of the largest of those cut."""
    elastic, cut = comparison["elastic"][MEAN], comparison["trained_at_all_then_cut"][MEAN]
    fixed = {budget: by_kind[MEAN] for budget, by_kind in comparison["fixed"].items()}
    rows = {
        "m": dict(zip(elastic, elastic)),
        "one elastic model": as_percent(elastic),
        "trained at m only": as_percent(fixed),
        "trained at 16, cut": as_percent(cut),
    }
    return ["", *(f"{name:<20}" + "".join(f"{row.get(m, ''):>6}" for m in elastic) for name, row in rows.items())]


def as_percent(shares: dict[str, float]) -> dict[str, str]:
    return {name: f"{100 * share:.1f}" for name, share in shares.items()}
