"""Every command of the guide is parsed, by the parsers that would parse it."""

import itertools
import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

from mqt_llava.cli import build_parser
from mqt_llava.training.recipe import checked, make_recipe, read_values
from mqt_llava.training.records import conversation_of


ROOT = Path(__file__).parents[1]
GUIDE = (ROOT / "docs" / "training.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", GUIDE, re.MULTILINE | re.DOTALL)


COMMANDS = [line for block in blocks("bash") for line in block.splitlines() if line.strip()]


def check_training(recipe, overrides):
    values = read_values(ROOT / recipe, [*overrides, "--use_cpu"])
    make_recipe(values)


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_parses(line, monkeypatch):
    program, *words = itertools.dropwhile(lambda word: re.match(r"[A-Z_]+=", word), shlex.split(line))
    if program == "mqt-llava":
        arguments = build_parser().parse_args(words)
        if arguments.command == "train":
            check_training(arguments.recipe, arguments.overrides)
    elif program == "accelerate":
        from accelerate.commands.config.config_args import load_config_from_file
        from accelerate.commands.launch import launch_command_parser

        arguments = launch_command_parser().parse_args(words[1:])
        assert (arguments.module, arguments.training_script) == (True, "mqt_llava.training")
        if arguments.config_file is not None:
            assert load_config_from_file(str(ROOT / arguments.config_file)).num_processes % 8 == 0
        check_training(arguments.training_script_args[0], arguments.training_script_args[1:])
    elif program == "torchrun":
        from torch.distributed.run import get_args_parser

        arguments = get_args_parser().parse_args(words)
        assert (arguments.module, arguments.training_script) == (True, "mqt_llava.training")
        check_training(arguments.training_script_args[0], arguments.training_script_args[1:])
    else:
        pytest.fail(f"no parser for {program}")


def test_there_are_commands():
    assert len(COMMANDS) > 10


@pytest.mark.parametrize("block", blocks("yaml"))
def test_every_piece_of_a_recipe_is_one(block):
    make_recipe(checked({**yaml.safe_load(block), "use_cpu": True}))


@pytest.mark.parametrize("block", blocks("json"))
def test_every_record_can_be_read(block):
    for record in json.loads(block):
        assert conversation_of(record)["messages"]


@pytest.mark.parametrize("block", blocks("python"))
def test_every_piece_of_python_compiles(block):
    compile(block, "guide", "exec")


def test_every_file_that_the_guide_names_is_there():
    for name in re.findall(r"\b(?:recipes|benchmarks)/[\w/]+\.(?:yaml|py)", GUIDE):
        assert (ROOT / name).is_file(), name
