"""A real process is killed at a moment that it does not choose, and goes on as if nothing had been."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_helpers import trainer

from mqt_llava.training.checkpoints import STAGING, last_checkpoint


TINY = Path(__file__).parents[1] / "recipes" / "tiny.yaml"
STEPS = 12
SETTINGS = f"--max_steps {STEPS} --save_steps 3 --logging_steps 1 --eval_strategy no --per_device_train_batch_size 4"

# A save that dawdles, so that a kill can be sure to fall into it.
SLOW_SAVE = """
import sys, time
from mqt_llava.training.trainer import MqtLlavaTrainer
save = MqtLlavaTrainer._save_optimizer_and_scheduler
def slowly(self, output_dir):
    print("saving", self.state.global_step, flush=True)
    time.sleep(1.0)
    save(self, output_dir)
MqtLlavaTrainer._save_optimizer_and_scheduler = slowly
step = MqtLlavaTrainer.training_step
def told(self, *args, **kwargs):
    print("step", self.state.global_step, flush=True)
    return step(self, *args, **kwargs)
MqtLlavaTrainer.training_step = told
from mqt_llava.cli import main
sys.exit(main(["train", *sys.argv[1:]]))
"""


def command(folder, *more):
    words = [str(TINY), "--output_dir", str(folder), *SETTINGS.split(), "--disable_tqdm", "--use_cpu", *more]
    return [sys.executable, "-c", SLOW_SAVE, *words]


def run(folder, *more):
    subprocess.run(command(folder, *more), check=True, capture_output=True, text=True)


def kill_at(folder, line, *more):
    """Starts a run and kills it when it says `line`; whether it got that far."""
    process = subprocess.Popen(command(folder, *more), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    for said in process.stdout:
        if said.strip() == line:
            time.sleep(0.2 if line.startswith("saving") else 0)
            os.kill(process.pid, signal.SIGKILL)
            break
    process.stdout.close()
    return process.wait() == -signal.SIGKILL


def outcome(folder):
    """What two runs are compared by: m and loss of every step, and the weights."""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    steps = [(entry["step"], entry["num_visual_tokens"], entry["loss"]) for entry in history if "loss" in entry]
    return steps, load_file(folder / "model.safetensors")


def check_same(folder, expected):
    steps, weights = outcome(folder)
    assert steps == expected[0]
    assert weights.keys() == expected[1].keys()
    assert all(torch.equal(value, weights[name]) for name, value in expected[1].items())


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    run(folder)
    steps, weights = outcome(folder)
    assert [step for step, _, _ in steps] == list(range(1, STEPS + 1))
    assert len({m for _, m, _ in steps}) > 3
    return steps, weights


def test_a_killed_run_ends_as_if_it_had_not_been(tmp_path, uninterrupted):
    """Killed between checkpoints, then while one is written, then resumed to the end."""
    assert kill_at(tmp_path, "step 4")
    assert Path(last_checkpoint(tmp_path)).name == "checkpoint-3"
    assert kill_at(tmp_path, "saving 9", "--resume")
    assert (tmp_path / STAGING / "checkpoint-9").exists()  # half-written
    assert Path(last_checkpoint(tmp_path)).name == "checkpoint-6"
    run(tmp_path, "--resume")
    check_same(tmp_path, uninterrupted)
    assert not (tmp_path / STAGING).exists()


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["step 0", "step 2", "saving 3", "step 5", "saving 6", "step 7", "saving 12"])
@pytest.mark.parametrize("time_", range(3))
def test_a_run_killed_at_any_moment_ends_as_if_it_had_not_been(tmp_path, uninterrupted, moment, time_):
    assert kill_at(tmp_path, moment)
    run(tmp_path, "--resume")
    check_same(tmp_path, uninterrupted)


def test_a_folder_that_only_looks_like_a_checkpoint_raises(tmp_path):
    (tmp_path / "checkpoint-5").mkdir()
    with pytest.raises(ValueError, match="not a whole checkpoint"):
        last_checkpoint(tmp_path)


def test_a_full_disk_leaves_the_checkpoint_before_it(tmp_path, monkeypatch):
    ours = trainer(tmp_path, max_steps=4, save_strategy="steps", save_steps=2, save_total_limit=1)
    save = ours._save_optimizer_and_scheduler

    def full(output_dir):
        if ours.state.global_step == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(output_dir)

    monkeypatch.setattr(ours, "_save_optimizer_and_scheduler", full)
    with pytest.raises(OSError, match="No room for the checkpoint 'checkpoint-4'") as error:
        ours.train()
    assert error.value.errno == errno.ENOSPC
    assert Path(last_checkpoint(tmp_path)).name == "checkpoint-2"
    assert not (tmp_path / STAGING).exists()


def test_a_file_size_limit_of_the_system_is_told_as_a_full_disk(tmp_path):
    """The weights fit, the optimizer does not: what a writer really says when there is no more room."""
    code = (
        "import sys, resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "from training_helpers import trainer\n"
        "ours = trainer(sys.argv[2], max_steps=2, save_strategy='steps', save_steps=1)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, resource.RLIM_INFINITY))\n"
        "try: ours.train()\n"
        "except OSError as error: print('told', error)"
    )
    told = subprocess.run(
        [sys.executable, "-c", code, str(Path(__file__).parent), str(tmp_path)], capture_output=True, text=True
    )
    assert "told" in told.stdout, told.stderr[-2000:]
    assert "No room for the checkpoint" in told.stdout
    assert last_checkpoint(tmp_path) is None


def test_old_checkpoints_go_when_the_new_one_is_whole(tmp_path):
    ours = trainer(tmp_path, max_steps=4, save_strategy="steps", save_steps=1, save_total_limit=2)
    ours.train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]


def test_the_best_checkpoint_is_known_by_its_final_name(tmp_path):
    ours = trainer(
        tmp_path,
        max_steps=2,
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        eval_budgets=[1, 16],
        load_best_model_at_end=True,
        metric_for_best_model="loss@16",
    )
    ours.train()
    assert ours.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    state = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(tmp_path / "checkpoint-2")
