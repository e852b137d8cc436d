"""
`mqt-llava`: one parser; each command a thin call into the room that does the work, imported when it is run.
"""

import argparse
import sys


def main(argv: list[str] | None = None) -> int:
    """Runs one command. Errors that a user can mend are one line on stderr and exit code 2."""
    args = build_parser().parse_args(argv)
    try:
        return args.run(args) or 0
    except (ValueError, OSError) as error:
        print(f"mqt-llava {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        return 130


def build_parser() -> argparse.ArgumentParser:
    """All commands and their arguments."""
    parser = argparse.ArgumentParser(
        prog="mqt-llava", description="One vision-language model, any number of visual tokens."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add_command in (_add_quickstart, _add_ask, _add_train, _add_merge):
        add_command(commands)
    return parser


def _add_quickstart(commands) -> None:
    command = commands.add_parser("quickstart", help="train a tiny elastic model on this machine, in minutes")
    command.add_argument("--output-dir", default="runs/quickstart", help="default: %(default)s")
    command.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    command.add_argument("--steps", type=int, help="optimizer steps of the language stage (default: the recipe's)")
    command.add_argument("--compare", action="store_true", help="also train fixed-m models and plot them beside it")
    command.add_argument("--overwrite", action="store_true", help="replace a finished run in the output folder")
    command.set_defaults(run=_run_quickstart)


def _run_quickstart(args: argparse.Namespace) -> None:
    from .quickstart import run_quickstart

    run_quickstart(
        args.output_dir,
        seed=args.seed,
        steps=args.steps,
        compare=args.compare,
        overwrite=args.overwrite,
        echo=print,
    )


def _add_ask(commands) -> None:
    command = commands.add_parser("ask", help="ask a model about an image, at one or several budgets")
    command.add_argument("image", help="path or URL of the image")
    command.add_argument("question")
    command.add_argument("--model", default="runs/quickstart", help="folder or Hub id (default: %(default)s)")
    command.add_argument(
        "--num-visual-tokens", type=_budgets, metavar="M[,M...]", help="budgets (default: the model's own)"
    )
    command.add_argument("--max-new-tokens", type=int, default=64, help="default: %(default)s")
    command.set_defaults(run=_run_ask)


def _budgets(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be whole numbers separated by commas, got {text!r}") from None


def _run_ask(args: argparse.Namespace) -> None:
    from .evaluation.ask import ask

    rows = ask(args.model, args.image, args.question, args.num_visual_tokens, args.max_new_tokens)
    width = max(len(str(row.num_visual_tokens)) for row in rows)
    for row in rows:
        print(f"m = {row.num_visual_tokens:>{width}}   {row.prefill_flops / 1e6:12,.1f} MFLOPs prefill   {row.answer}")


def _add_train(commands) -> None:
    command = commands.add_parser("train", help="train a model as a recipe says")
    command.add_argument("recipe", help="YAML file, such as recipes/tiny.yaml")
    command.add_argument(
        "overrides",
        nargs=argparse.REMAINDER,
        metavar="--key value",
        help="changes to the recipe: --max_steps 10 --lora",
    )
    command.set_defaults(run=_run_train)


def _run_train(args: argparse.Namespace) -> None:
    from .training.recipe import load_recipe
    from .training.run import train

    finished = train(load_recipe(args.recipe, args.overrides))
    if finished.trainer.is_world_process_zero():
        print(f"Trained model in {finished.trainer.args.output_dir}.")


def _add_merge(commands) -> None:
    command = commands.add_parser("merge", help="merge adapters into their model")
    command.add_argument("adapter", help="folder that `train --lora` has written")
    command.add_argument("output_dir", help="folder for the merged model")
    command.set_defaults(run=_run_merge)


def _run_merge(args: argparse.Namespace) -> None:
    from .training.models import merge_adapters

    merge_adapters(args.adapter, args.output_dir)
    print(f"Merged model in {args.output_dir}.")


if __name__ == "__main__":
    sys.exit(main())
