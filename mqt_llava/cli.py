"""
`mqt-llava`: one parser; each command a thin call into the room that does the work, imported when it is run.
"""

import argparse
import sys
from pathlib import Path


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
    commands_in_order = (_add_quickstart, _add_ask, _add_train, _add_convert, _add_upcycle, _add_merge, _add_push)
    for add_command in commands_in_order:
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
    from accelerate import PartialState

    from .training.recipe import load_recipe
    from .training.run import train

    finished = train(load_recipe(args.recipe, args.overrides))
    if finished.trainer.is_world_process_zero():
        print(f"Trained model in {finished.trainer.args.output_dir}.")
    PartialState().destroy_process_group()  # its threads, if there are several ranks, end before the interpreter does


def _add_convert(commands) -> None:
    command = commands.add_parser("convert", help="bring a checkpoint of the authors' code to this project's layout")
    command.add_argument(
        "source", help="folder or Hub id of a model, LoRA run or first stage; or a query_abstractor.bin"
    )
    command.add_argument("destination", help="folder to write; must be new or empty")
    command.add_argument(
        "--vision-tower", metavar="ID_OR_DIR", help="the CLIP (default: inside, or what the config names)"
    )
    command.add_argument("--base-model", metavar="ID_OR_DIR", help="language model under a LoRA run or a first stage")
    command.add_argument("--revision", help="of a Hub source (default: main)")
    _add_push_arguments(command, "--push-to-hub")
    command.set_defaults(run=_run_convert)


def _run_convert(args: argparse.Namespace) -> None:
    from .conversion.convert import convert

    convert(
        args.source,
        args.destination,
        vision_tower=args.vision_tower,
        base_model=args.base_model,
        **({} if args.revision is None else {"revision": args.revision}),
    )
    print(f"Converted to {args.destination}")
    _push_if_asked(args.destination, args, base_model=_hub_id(args.source))


def _add_upcycle(commands) -> None:
    command = commands.add_parser("upcycle", help="start from a LLaVA-1.5: its tower and language model, new queries")
    command.add_argument("source", help="folder or Hub id of a LLaVA in Transformers' layout")
    command.add_argument("destination", help="folder to write; must be new or empty")
    command.add_argument("--max-visual-tokens", type=int, default=256, help="M, a square (default: %(default)s)")
    command.add_argument("--seed", type=int, default=0, help="of the new weights (default: %(default)s)")
    _add_push_arguments(command, "--push-to-hub")
    command.set_defaults(run=_run_upcycle)


def _run_upcycle(args: argparse.Namespace) -> None:
    from .conversion.components import upcycle

    upcycle(args.source, args.destination, max_visual_tokens=args.max_visual_tokens, seed=args.seed)
    print(f"Ready to train: {args.destination}")
    _push_if_asked(args.destination, args, base_model=_hub_id(args.source))


def _add_merge(commands) -> None:
    command = commands.add_parser("merge", help="merge a PEFT adapter into the model it was trained on")
    command.add_argument("adapter", help="folder or Hub id")
    command.add_argument("destination", help="folder to write; must be new or empty")
    command.add_argument("--base-model", metavar="ID_OR_DIR", help="default: what the adapter names")
    _add_push_arguments(command, "--push-to-hub")
    command.set_defaults(run=_run_merge)


def _run_merge(args: argparse.Namespace) -> None:
    from .conversion.adapters import merge

    merge(args.adapter, args.destination, base_model=args.base_model)
    print(f"Merged to {args.destination}")
    _push_if_asked(args.destination, args)


def _add_push(commands) -> None:
    command = commands.add_parser("push", help="upload a saved model or adapter to the Hub")
    command.add_argument("folder")
    _add_push_arguments(command, "push_to_hub")
    command.add_argument("--license", help="for a new model card")
    command.add_argument("--evaluation", metavar="FILE", help="JSON of {task: {m: score}}, for a new model card")
    command.set_defaults(run=_run_push)


def _run_push(args: argparse.Namespace) -> None:
    from .card import read_evaluation

    evaluation = None if args.evaluation is None else read_evaluation(args.evaluation)
    _push_if_asked(args.folder, args, license=args.license, evaluation=evaluation)


def _add_push_arguments(command, repo_argument: str) -> None:
    command.add_argument(repo_argument, metavar="ID", help="Hub id to upload to")
    command.add_argument("--include-code", action="store_true", help="upload the code too, for trust_remote_code=True")
    command.add_argument("--private", action="store_true", default=None, help="if the repository is created")


def _hub_id(source: str) -> str | None:
    """What a model card may name as the base: nothing that lies on this machine."""
    return None if Path(source).exists() else source


def _push_if_asked(folder: str, args: argparse.Namespace, **card) -> None:
    if args.push_to_hub is None:
        return
    from .hub import push_folder

    print(push_folder(folder, args.push_to_hub, include_code=args.include_code, private=args.private, **card))


if __name__ == "__main__":
    sys.exit(main())
