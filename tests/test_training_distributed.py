"""Two processes on the CPU (gloo) against one: the same losses, the same weights."""

import functools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_helpers import tiny_model


WORKER = Path(__file__).parent / "training_worker.py"


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """The model that all runs begin with."""
    folder = tmp_path_factory.mktemp("start")
    tiny_model().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def alone(start, tmp_path_factory):
    """What one process finds with a draw, run once for each."""

    @functools.cache
    def run(draw):
        return launch("alone", draw, tmp_path_factory.mktemp("alone") / "run", 1, start)

    return run


def launch(kind, draw, folder, world, start):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = (
        ["-m", "torch.distributed.run", f"--nproc_per_node={world}", f"--master_port={port}"] if world > 1 else []
    )
    folder.mkdir()
    run = subprocess.run(
        [sys.executable, *launcher, str(WORKER), kind, draw, str(folder), str(world), str(start)],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads((folder / "found.json").read_text()), load_file(folder / "result" / "model.safetensors")


# The draws that take several passes a step are told apart by what the ranks do between the passes.
@pytest.mark.parametrize(
    "kind, draw",
    [
        ("ddp", "uniform_all"),
        ("fsdp2", "uniform_all"),
        pytest.param("ddp", "sandwich", marks=pytest.mark.slow),
        pytest.param("fsdp2", "sandwich", marks=pytest.mark.slow),
        ("zero2", "uniform_all"),
        ("zero2", "sandwich"),
        ("zero3", "uniform_all"),
        ("zero3", "sandwich"),
    ],
)
def test_two_ranks_give_the_losses_and_weights_of_one(tmp_path, start, alone, kind, draw):
    """Rows with images on one rank and without on the other are among the batches."""
    if kind.startswith("zero"):
        pytest.importorskip("deepspeed")
    found, weights = launch(kind, draw, tmp_path / "run", 2, start)
    expected, expected_weights = alone(draw)
    assert (found["world"], found["sharded"]) == (2, kind in ("fsdp2", "zero3"))
    assert found["num_visual_tokens"] == expected["num_visual_tokens"]
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert found["eval"] == pytest.approx(expected["eval"], rel=1e-5)
    for ours, theirs in zip(found["buckets"], expected["buckets"]):
        assert ours == pytest.approx(theirs, rel=1e-5)
    assert weights.keys() == expected_weights.keys()
    for name, value in expected_weights.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-4, atol=1e-6, msg=name)
