"""One run: a recipe in, a trained model in its output folder out."""

import logging
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from accelerate.utils import get_int_from_env
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..hub import push_folder
from .checkpoints import STAGING, last_checkpoint, wait_for_all
from .conversations import CHAT_TEMPLATES, ConversationCollator, ConversationEncoder
from .data import SkipLog
from .models import BASE, load_model_and_processor
from .plots import plot_budgets
from .recipe import Recipe
from .sources import make_dataset
from .trainer import MqtLlavaTrainer


logger = logging.getLogger(__name__)
WORLD_SIZES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
"""Where torchrun and the makes of mpirun say how many processes there are."""
SKIPPED = "skipped.jsonl"
NOT_PUSHED = {SKIPPED, "README.md", "training_args.bin"}
"""Files of a run that are no part of its model."""


@dataclass
class Finished:
    """A run that is over."""

    trainer: MqtLlavaTrainer
    skipped: str | None
    """What was left out of the data and why, for the user to read; none if nothing was."""


def train(recipe: Recipe) -> Finished:
    """
    Runs a recipe to its end, or from its last checkpoint to its end.

    Leaves in `output_dir`: the model (or its adapter) and processor, checkpoints, `budgets.png` with the evaluation
    losses at each budget, and `skipped.jsonl` with the bad records.

    Raises:
        ValueError: for a recipe that contradicts itself, or a folder that holds another run.
        OSError: if the disk is full; the checkpoints before are whole.
    """
    output_dir = recipe.training.output_dir
    warn_if_left_alone()
    checkpoint = prepare_folder(recipe)
    model, processor = load_model_and_processor(recipe.model, output_dir, recipe.training.seed)
    set_processor(processor, recipe)
    skip_log = SkipLog(os.path.join(output_dir, SKIPPED), strict=recipe.data.strict_data)
    trainer = make_trainer(recipe, model, processor, skip_log)
    trainer.train(resume_from_checkpoint=checkpoint)
    save_result(trainer)
    report = skip_log.report(count(trainer.train_dataset)) if trainer.is_world_process_zero() else None
    if report:
        logger.warning(report)
    return Finished(trainer, report)


def warn_if_left_alone() -> None:
    """
    `accelerate launch --cpu --num_processes N` names an address where N processes are to meet, then starts one: the
    rest it leaves to `mpirun` (`prepare_simple_launcher_cmd_env` in accelerate 1.15).
    """
    launched = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true" and "MASTER_ADDR" in os.environ
    if launched and get_int_from_env(WORLD_SIZES, 0) == 0:
        logger.warning(
            "This is one process: `accelerate launch --cpu` leaves all others to mpirun, whatever `--num_processes` "
            "says. To have them, start with `torchrun --nproc_per_node N -m mqt_llava.training ... --use_cpu`."
        )


def set_processor(processor, recipe: Recipe) -> None:
    """
    What the processor is to do from now on, also after training. The plain template is for captions of the first stage
    alone: conversations keep theirs.
    """
    if recipe.data.image_aspect is not None:
        processor.image_processor.do_pad = recipe.data.image_aspect == "pad"
    template = recipe.data.chat_template
    if template not in (None, "plain"):
        chosen = CHAT_TEMPLATES.get(template, template)
        several = isinstance(processor.chat_template, dict)
        processor.chat_template = {**processor.chat_template, "default": chosen} if several else chosen


def make_trainer(recipe: Recipe, model, processor, skip_log: SkipLog) -> MqtLlavaTrainer:
    """The trainer with its data."""
    data, seed = recipe.data, recipe.training.seed
    encode = ConversationEncoder(processor, data.max_length, data.chat_template)
    train_dataset = make_dataset(data.data, data, encode, skip_log, seed)
    eval_dataset = make_dataset(data.eval_data, data, encode, skip_log, seed) if data.eval_data else None
    return MqtLlavaTrainer(
        model,
        recipe.training,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        data_collator=ConversationCollator(processor, data.max_length, data.chat_template),
        processing_class=processor,
        callbacks=[EvaluateAtTheEnd()] if eval_dataset is not None else [],
    )


class EvaluateAtTheEnd(TrainerCallback):
    """The last step is evaluated whatever the strategy, while the loggers still listen."""

    def on_step_end(self, args, state, control, **kwargs):
        """Asks for it."""
        control.should_evaluate = control.should_evaluate or state.global_step >= state.max_steps


def prepare_folder(recipe: Recipe) -> str | None:
    """
    The checkpoint to go on from, in a folder that is ready.

    Raises:
        ValueError: if there are checkpoints, and the recipe neither resumes nor overwrites them.
    """
    output_dir = recipe.training.output_dir
    if output_dir is None:
        raise ValueError("`output_dir` must name a folder for the results.")
    if recipe.run.overwrite and not recipe.run.resume and recipe.training.process_index == 0:
        clear(output_dir)
    os.makedirs(output_dir, exist_ok=True)
    wait_for_all()
    checkpoint = recipe.training.resume_from_checkpoint or last_checkpoint(output_dir)
    if checkpoint and not (recipe.run.resume or recipe.training.resume_from_checkpoint):
        raise ValueError(
            f"`output_dir` {output_dir!r} holds the checkpoints of a run. Pass `--resume` to go on with it, "
            "`--overwrite` to delete them and start anew, or another `--output_dir`."
        )
    return checkpoint


def clear(output_dir: str) -> None:
    """Removes what a run leaves that would mix with another's: checkpoints, the base of adapters, skipped records."""
    for name in os.listdir(output_dir) if os.path.isdir(output_dir) else []:
        path = os.path.join(output_dir, name)
        if name.startswith(f"{PREFIX_CHECKPOINT_DIR}-") or name in (STAGING, BASE):
            shutil.rmtree(path)
        elif name in (SKIPPED, "adapter_config.json", "adapter_model.safetensors"):
            os.remove(path)


def save_result(trainer: MqtLlavaTrainer) -> None:
    """The final model, file by file in place of what was there; then the curves, then the Hub if it is asked for."""
    output_dir = trainer.args.output_dir
    staged = os.path.join(output_dir, STAGING, "result")
    trainer.save_model(staged, _internal_call=True)
    wait_for_all()
    if trainer.is_world_process_zero():
        for name in sorted(os.listdir(staged)):
            os.replace(os.path.join(staged, name), os.path.join(output_dir, name))
        shutil.rmtree(os.path.join(output_dir, STAGING), ignore_errors=True)
        trainer.state.save_to_json(os.path.join(output_dir, "trainer_state.json"))
        if trainer.eval_budgets:
            plot_budgets(trainer.state.log_history, os.path.join(output_dir, "budgets.png"))
        if trainer.args.push_to_hub:
            push_result(trainer)
    wait_for_all()


def push_result(trainer: MqtLlavaTrainer) -> None:
    """
    Uploads what [`save_result`] wrote, with this project's model card. (PEFT's own names a folder of this machine as
    the base, which the Hub refuses.)
    """
    args = trainer.args
    trainer._finish_current_push()
    with tempfile.TemporaryDirectory() as folder:
        for path in Path(args.output_dir).iterdir():
            if path.is_file() and path.name not in NOT_PUSHED:
                shutil.copy2(path, folder)
        push_folder(
            folder,
            trainer.hub_model_id,
            private=args.hub_private_repo,
            token=args.hub_token,
            revision=args.hub_revision,
        )


def count(dataset) -> int | None:
    """Records of a data set, if it knows."""
    return len(dataset) if hasattr(dataset, "__len__") else None
