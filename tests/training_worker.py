"""Run under torchrun and alone by the tests of distributed training: trains a little and writes down what came out."""

import json
import os
import sys
from pathlib import Path

import torch
from training_helpers import arguments, conversations, logged, trainer

from mqt_llava import MqtLlavaForConditionalGeneration
from mqt_llava.training.models import freeze_all_but


def shard_on_the_cpu():
    """Accelerate shards on accelerators alone, though torch can on a CPU: told that this is one, it does."""
    from accelerate import DistributedType, PartialState
    from transformers import TrainingArguments

    setup = TrainingArguments._setup_devices.func

    def told(self):
        device = setup(self)
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        return device

    TrainingArguments._setup_devices.func = told


def settings_of(kind):
    """What shards the model, if anything."""
    if kind == "fsdp2":
        shard_on_the_cpu()
        return {"fsdp": "full_shard", "fsdp_config": {"fsdp_version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}}
    if kind.startswith("zero"):
        auto = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
        zero = {"stage": int(kind[-1]), "stage3_gather_16bit_weights_on_model_save": True}
        return {"deepspeed": {**dict.fromkeys(auto, "auto"), "zero_optimization": zero}}
    return {}


def main():
    kind, draw, folder, world = sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])
    # In 2 processes the first batches are: images with text, then text alone on one rank, then on both.
    pictures, text = conversations(6), conversations(10, images=0)
    examples = [*pictures[:4], *pictures[4:6], *text[:2], *text[2:6], *text[6:10]]
    args = arguments(  # before the model, which ZeRO-3 shards as it is loaded
        folder,
        draw=draw,
        optim="sgd",
        learning_rate=0.1,
        train_sampling_strategy="sequential",
        max_steps=6,
        per_device_train_batch_size=4 // world,
        per_device_eval_batch_size=4 // world,
        eval_budgets=[1, 16],
        **settings_of(kind),
    )
    model = MqtLlavaForConditionalGeneration.from_pretrained(sys.argv[5])
    freeze_all_but(model, ("query_transformer", "language_model"))
    ours = trainer(args, model=model, examples=examples)
    ours.eval_dataset = [*pictures[:2], *text[:2], *pictures[2:3]]
    ours.train()
    metrics = ours.evaluate()
    ours.save_model(str(folder / "result"))
    if ours.is_world_process_zero():
        found = {key: logged(ours, key) for key in ("loss", "num_visual_tokens")}
        found["eval"] = {key: value for key, value in metrics.items() if "loss" in key}
        found["buckets"] = [
            {key: value for key, value in entry.items() if key.startswith("loss_m")} for entry in ours.state.log_history
        ]
        found["world"] = ours.accelerator.num_processes
        found["sharded"] = any(type(p).__name__ == "DTensor" or hasattr(p, "ds_id") for p in ours.model.parameters())
        (folder / "found.json").write_text(json.dumps(found))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        # All is written. The threads of gloo and the end of the interpreter race, and about one run in ten would end
        # with "terminate called without an active exception": leave without the interpreter's own goodbye.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


if __name__ == "__main__":
    main()
