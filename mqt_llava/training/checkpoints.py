"""
Checkpoints that are whole or not there: written aside, brought to disk, then renamed.
"""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint, rotate_checkpoints


STAGING = ".incomplete"
"""Folder inside the run's, where checkpoints are written. Nothing in it is ever resumed from."""


def last_checkpoint(output_dir: str) -> str | None:
    """The newest whole checkpoint of a run, if there is one. The state is the last file that a checkpoint gets."""
    if not os.path.isdir(output_dir):
        return None
    folder = get_last_checkpoint(output_dir)
    if folder is not None and not os.path.isfile(os.path.join(folder, TRAINER_STATE_NAME)):
        raise ValueError(
            f"{folder!r} is not a whole checkpoint: it has no {TRAINER_STATE_NAME}. Another program "
            "wrote it; delete it to resume from the one before."
        )
    return folder


class StagedCheckpoints(Trainer):
    """A `Trainer` whose checkpoints appear whole. To be mixed in before other trainers."""

    _staging = False

    def _get_output_dir(self, trial) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, STAGING) if self._staging else folder

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self._staging:  # only what has its final name
            super()._push_from_checkpoint(checkpoint_folder)

    def _save_checkpoint(self, model, trial) -> None:
        run_dir = super()._get_output_dir(trial)
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        staged, final = os.path.join(run_dir, STAGING, name), os.path.join(run_dir, name)
        if self.args.should_save:
            shutil.rmtree(os.path.join(run_dir, STAGING), ignore_errors=True)
        wait_for_all()
        with self._staged(), clear_disk_errors(staged):
            super()._save_checkpoint(model, trial)
            self._name_best(staged, final)
        wait_for_all()
        if self.args.should_save:
            with clear_disk_errors(staged):
                publish(staged, final)
        wait_for_all()
        if self.args.push_to_hub:
            self._push_from_checkpoint(final)
        if self.args.should_save:
            rotate_checkpoints(run_dir, self.args.save_total_limit, self.state.best_model_checkpoint, use_mtime=True)

    @contextmanager
    def _staged(self) -> Iterator[None]:
        self._staging = True
        try:
            yield
        finally:
            self._staging = False

    def _name_best(self, staged: str, final: str) -> None:
        """If the staged checkpoint is the best so far, it will be so under its final name."""
        if self.state.best_model_checkpoint == staged:
            self.state.best_model_checkpoint = final
            if self.args.should_save:
                self.state.save_to_json(os.path.join(staged, TRAINER_STATE_NAME))


def wait_for_all() -> None:
    """Ranks wait for each other, if there are several."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()


def publish(staged: str, final: str) -> None:
    """Brings a finished folder to disk and gives it its name."""
    for path in Path(staged).rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    if os.path.isdir(final):  # of a run that was resumed from further back
        os.replace(final, os.path.join(os.path.dirname(staged), "replaced"))
    os.rename(staged, final)
    descriptor = os.open(os.path.dirname(final), os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    shutil.rmtree(os.path.dirname(staged), ignore_errors=True)


@contextmanager
def clear_disk_errors(staged: str) -> Iterator[None]:
    """
    Raises:
        OSError: in place of whatever a full disk makes the writers say. What was written so far is removed, so that the
            disk has room again.
    """
    try:
        yield
    except Exception as error:
        if not is_disk_full(error):
            raise
        shutil.rmtree(os.path.dirname(staged), ignore_errors=True)
        raise OSError(
            errno.ENOSPC,
            f"No room for the checkpoint {os.path.basename(staged)!r}. The checkpoints before it are whole: free some "
            "space (`save_total_limit` keeps fewer of them) and resume",
            os.path.dirname(os.path.dirname(staged)),
        ) from error


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an error, or what it was raised from, is about a full disk or quota. Not all writers keep the number."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return True
        text = str(error)
        if any(
            words in text
            for words in ("No space left", "os error 28", "os error 27", "File too large", "unexpected pos")
        ):
            return True
        error = error.__cause__ or error.__context__
    return False
