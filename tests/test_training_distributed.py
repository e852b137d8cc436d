"""Two processes on the CPU (gloo) against one: the same losses, the same weights."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file


WORKER = Path(__file__).parent / "training_worker.py"


def launch(kind, folder, world):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = (
        ["-m", "torch.distributed.run", f"--nproc_per_node={world}", f"--master_port={port}"] if world > 1 else []
    )
    folder.mkdir()
    run = subprocess.run(
        [sys.executable, *launcher, str(WORKER), kind, str(folder), str(world)],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads((folder / "found.json").read_text()), load_file(folder / "result" / "model.safetensors")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return launch("ddp", tmp_path_factory.mktemp("alone") / "run", 1)


@pytest.mark.slow
def test_two_ranks_agree_with_one_on_several_budgets_a_step(tmp_path):
    found, weights = launch("several", tmp_path / "two", 2)
    expected, expected_weights = launch("several", tmp_path / "one", 1)
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    for name, value in expected_weights.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_ranks_give_the_losses_and_weights_of_one(tmp_path, alone, kind):
    """Rows with images on one rank and without on the other are among the batches."""
    found, weights = launch(kind, tmp_path / "run", 2)
    expected, expected_weights = alone
    assert (found["world"], found["sharded"]) == (2, kind == "fsdp2")
    assert found["num_visual_tokens"] == expected["num_visual_tokens"]
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert found["eval"] == pytest.approx(expected["eval"], rel=1e-5)
    for ours, theirs in zip(found["buckets"], expected["buckets"]):
        assert ours == pytest.approx(theirs, rel=1e-5)
    assert weights.keys() == expected_weights.keys()
    for name, value in expected_weights.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-4, atol=1e-6, msg=name)
