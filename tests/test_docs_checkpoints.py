"""The page on checkpoints is run as it stands: Python and commands, in order."""

import re
import shlex
from pathlib import Path

import pytest

from mqt_llava.cli import main


ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/checkpoints.md").read_text()


def test_every_command_and_block_of_python_runs(tmp_path, monkeypatch):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/fidelity").symlink_to(ROOT / "tests/fidelity")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for language, block in re.findall(r"^```(python|bash)\n(.*?)^```", PAGE, flags=re.M | re.S):
        if language == "python":
            exec(compile(block, "docs/checkpoints.md", "exec"), names)
            continue
        for command in block.strip().splitlines():
            program, *arguments = shlex.split(command)
            assert program == "mqt-llava"
            assert main(arguments) == 0, command


@pytest.mark.parametrize("command", re.findall(r"^mqt-llava .*", PAGE, flags=re.M))
def test_every_command_is_one_that_exists(command):
    from mqt_llava.cli import build_parser

    build_parser().parse_args(shlex.split(command)[1:])


def test_benchmarks_that_the_page_names_exist():
    named = set(re.findall(r"benchmarks/\w+\.py", PAGE))
    assert len(named) == 2
    assert all((ROOT / name).is_file() for name in named)
