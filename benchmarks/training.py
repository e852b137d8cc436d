"""
What a training step costs: this model at uniform m and at m = M, against LLaVA at all its patches, on the same tower,
language model, batch and text. Every variant runs in a process of its own; step times are medians.

    python benchmarks/training.py                                   # a shape for a CPU
    python benchmarks/training.py --shape 7b --lora --peak-tflops 989   # one GPU: random weights of the 7B's shape

Peak memory is what training needs beyond the weights: gradients, optimizer and activations.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """Sizes of a model and a batch."""

    vision: dict
    text: dict
    max_visual_tokens: int
    query_heads: int
    batch: int
    text_length: int
    answer_length: int


CLIP_336 = {"model_type": "clip_vision_model", "image_size": 336, "patch_size": 14}
SHAPES = {
    "cpu": Shape(
        {**CLIP_336, "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 2},
        {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 6},
        max_visual_tokens=256,
        query_heads=2,
        batch=4,
        text_length=64,
        answer_length=16,
    ),
    "7b": Shape(
        {
            **CLIP_336,
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
        },
        {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
        max_visual_tokens=256,
        query_heads=16,
        batch=8,
        text_length=256,
        answer_length=64,
    ),
}
VOCABULARY, IMAGE = 32000, 31999
VARIANTS = {"MQT, uniform m": "uniform", "MQT, m = M": "full", "LLaVA, 576 tokens, plain Trainer": "llava"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="cpu")
    parser.add_argument("--lora", action="store_true", help="adapters on the language model, the rest frozen")
    parser.add_argument(
        "--steps", type=int, default=16, help="timed steps, after two that are not (default: %(default)s)"
    )
    parser.add_argument("--peak-tflops", type=float, help="of the device, for the share of it that is used (MFU)")
    parser.add_argument("--variant", choices=VARIANTS.values(), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.variant:
        print(json.dumps(measure(args)))
        return
    found = {name: run_alone(variant) for name, variant in VARIANTS.items()}
    llava = found["LLaVA, 576 tokens, plain Trainer"]
    print("| | step (s) | samples/s | against LLaVA | peak over the weights (MB) | against LLaVA | MFU |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for name, row in found.items():
        mfu = f"{row['flops'] / row['step'] / args.peak_tflops / 1e12:.1%}" if args.peak_tflops else ""
        print(
            f"| {name} | {row['step']:.3f} | {row['samples']:.2f} | {row['samples'] / llava['samples']:.2f}x | "
            f"{row['memory']:,.0f} | {row['memory'] / llava['memory']:.0%} | {mfu} |"
        )


def run_alone(variant: str) -> dict:
    """One variant in a fresh process, so that peaks do not mix."""
    command = [sys.executable, __file__, *sys.argv[1:], "--variant", variant]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def measure(args) -> dict:
    """Median step, samples per second, peak memory over the weights, and the operations of a mean step."""
    import tempfile

    import torch
    from transformers import TrainerCallback, set_seed

    set_seed(0)
    shape, device = SHAPES[args.shape], "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if args.shape == "7b" else torch.float32
    model = make_model(args.variant, shape, dtype, device)
    trainer = make_trainer(args, model, shape, tempfile.mkdtemp())
    durations: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            synchronize(device)
            self.started = time.perf_counter()

        def on_step_end(self, *_, **__):
            synchronize(device)
            durations.append(time.perf_counter() - self.started)

    trainer.add_callback(Clock())
    weights = reset_peak(device)
    trainer.train()
    timed = durations[2:]
    return {
        "step": statistics.median(timed),
        "samples": shape.batch * len(timed) / sum(timed),
        "memory": peak(device) - weights,
        "flops": operations(trainer.model, shape, args),
    }


def make_model(variant: str, shape: Shape, dtype, device):
    """Random weights; the tower is frozen, as in both of the authors' stages."""
    import torch
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    from mqt_llava import MqtLlavaConfig, MqtLlavaForConditionalGeneration

    text = {"model_type": "llama", "vocab_size": VOCABULARY, "max_position_embeddings": 2048, **shape.text}
    common = {"vision_config": shape.vision, "text_config": text}
    torch.set_default_dtype(dtype)
    with torch.device(device):
        if variant == "llava":
            model = LlavaForConditionalGeneration(LlavaConfig(**common, image_token_id=IMAGE))
        else:
            config = MqtLlavaConfig(
                **common,
                image_token_index=IMAGE,
                max_visual_tokens=shape.max_visual_tokens,
                query_num_attention_heads=shape.query_heads,
            )
            model = MqtLlavaForConditionalGeneration(config)
    torch.set_default_dtype(torch.float32)
    model.model.vision_tower.requires_grad_(False)
    return model


def make_trainer(args, model, shape: Shape, folder: str):
    """Ours for ours, the plain one for LLaVA, on the same settings."""
    import torch
    from transformers import Trainer, TrainingArguments

    from mqt_llava.training.arguments import MqtLlavaTrainingArguments
    from mqt_llava.training.models import linear_layers_of
    from mqt_llava.training.trainer import MqtLlavaTrainer

    if args.lora:
        from peft import LoraConfig, get_peft_model

        targets = linear_layers_of(model.model.language_model, "model.language_model")
        model = get_peft_model(model, LoraConfig(r=128, lora_alpha=256, target_modules=targets))
    settings = {
        "output_dir": folder,
        "max_steps": args.steps + 2,
        "per_device_train_batch_size": shape.batch,
        "learning_rate": 1e-5,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
        "use_cpu": not torch.cuda.is_available(),
        "bf16": args.shape == "7b",
        "activation_checkpointing": args.shape == "7b",
    }
    data = [None] * (shape.batch * (args.steps + 2))
    visual = 576 if args.variant == "llava" else shape.max_visual_tokens
    if args.variant == "llava":
        return Trainer(model, TrainingArguments(**settings), train_dataset=data, data_collator=collator(shape, visual))
    draw = "uniform" if args.variant == "uniform" else f"fixed({shape.max_visual_tokens})"
    arguments = MqtLlavaTrainingArguments(**settings, draw=draw)
    return MqtLlavaTrainer(model, arguments, train_dataset=data, data_collator=collator(shape, visual))


def collator(shape: Shape, visual_tokens: int):
    """The same random batch each time: an image, a question, an answer that is learned."""
    import torch

    generator = torch.Generator().manual_seed(0)
    size = shape.vision["image_size"]
    text = torch.randint(5, 1000, (shape.batch, shape.text_length), generator=generator)
    ids = torch.cat([torch.full((shape.batch, visual_tokens), IMAGE), text], dim=1)
    labels = ids.clone()
    labels[:, : -shape.answer_length] = -100
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": labels,
        "pixel_values": torch.randn(shape.batch, 3, size, size, generator=generator),
    }
    return lambda examples: dict(batch)


def operations(model, shape: Shape, args) -> float:
    """
    Floating-point operations of a mean step, by the usual count: 2 per weight and token forward, 4 backward (2 where
    the weights do not learn). Attention itself and recomputation are left out.
    """
    parameters = dict.fromkeys(("vision_tower", "language_model"), 0)
    for name, parameter in model.named_parameters():
        for part in parameters:
            parameters[part] += parameter.numel() * (part in name and "embed_tokens" not in name)
    patches = (shape.vision["image_size"] // shape.vision["patch_size"]) ** 2
    visual = {"llava": 576, "full": shape.max_visual_tokens, "uniform": shape.max_visual_tokens / 2 + 1}[args.variant]
    tokens = shape.batch * (visual + shape.text_length)
    head = VOCABULARY * shape.text["hidden_size"]
    logits = shape.batch * (visual + shape.text_length if args.variant == "llava" else shape.answer_length)
    learned = 4 if args.lora else 6
    return 2 * parameters["vision_tower"] * shape.batch * patches + learned * (
        parameters["language_model"] * tokens + head * logits
    )


def synchronize(device: str) -> None:
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


def reset_peak(device: str) -> float:
    """MB in use now; peaks are counted from here."""
    import torch

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**20
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    return peak(device)


def peak(device: str) -> float:
    """The most MB in use since the last reset."""
    import re

    import torch

    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    with open("/proc/self/status") as file:
        return int(re.search(r"VmHWM:\s+(\d+)", file.read())[1]) / 1024


if __name__ == "__main__":
    main()
