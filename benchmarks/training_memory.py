"""
Memory of training the released 7B shape on GPUs, computed from its parameters (counted on the meta device).

    python benchmarks/training_memory.py --tokens 640 --batch 16

Bytes per parameter: one that learns has 4 for itself, 4 for its gradient, 8 for AdamW (FSDP2 and ZeRO keep float32
copies under mixed precision); one that is frozen has 2 (bfloat16) or, in 4 bits, 0.56. Activations are those of
checkpointing: one hidden state per layer kept, one layer at a time recomputed.
"""

import argparse

import torch

from mqt_llava import MqtLlavaConfig, MqtLlavaForConditionalGeneration


GB = 1e9
LORA_RANK = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=640, help="of a row, visual ones included (default: %(default)s)")
    parser.add_argument("--answer", type=int, default=128, help="of those learned (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=16, help="rows on a GPU (default: %(default)s)")
    args = parser.parse_args()
    with torch.device("meta"):
        model = MqtLlavaForConditionalGeneration(MqtLlavaConfig())
    parts = count(model)
    print(", ".join(f"{name} {number / 1e6:,.0f} M" for name, number in parts.items()))
    print(f"activations on a GPU: {activations(model.config.text_config, args) / GB:.1f} GB")
    print("| | GPUs | weights, gradients, optimizer (GB each) | with activations (GB each) |\n|---|---:|---:|---:|")
    for name, states in states_of(model, parts).items():
        for gpus in (1, 4, 8, 64):
            each = states / gpus + gathered(model, parts) * (gpus > 1)
            total = each + activations(model.config.text_config, args)
            print(f"| {name} | {gpus} | {each / GB:.1f} | {total / GB:.1f} |")


def count(model) -> dict[str, int]:
    """Parameters by part."""
    parts = {"tower": 0, "query transformer": 0, "language model": 0}
    for name, parameter in model.named_parameters():
        part = "tower" if "vision_tower" in name else "query transformer" if "query_tr" in name else "language model"
        parts[part] += parameter.numel()
    return parts


def states_of(model, parts: dict[str, int]) -> dict[str, float]:
    """Bytes of weights, gradients and optimizer on all GPUs together."""
    layers = [m for m in model.model.language_model.modules() if isinstance(m, torch.nn.Linear)]
    adapters = sum(LORA_RANK * (layer.in_features + layer.out_features) for layer in layers)
    learned, frozen = 16, 2
    small = parts["tower"] * frozen + parts["query transformer"] * learned
    return {
        "full": small + parts["language model"] * learned,
        "LoRA, rank 128": small + parts["language model"] * frozen + adapters * learned,
        "QLoRA, rank 128": small + parts["language model"] * 0.56 + adapters * learned,
    }


def gathered(model, parts: dict[str, int]) -> float:
    """Bytes of two layers in bfloat16: the one that is computed, and the next, which is on its way."""
    return 2 * 2 * parts["language model"] / model.config.text_config.num_hidden_layers


def activations(text, args) -> float:
    """Bytes of a GPU's batch: kept hidden states, one layer in full, logits in bfloat16 and float32 with gradients."""
    tokens = args.batch * args.tokens
    kept = 2 * tokens * text.hidden_size * text.num_hidden_layers
    one_layer = 2 * tokens * (8 * text.hidden_size + 3 * text.intermediate_size)
    logits = args.batch * args.answer * text.vocab_size * (2 + 4 + 4)
    return kept + one_layer + logits


if __name__ == "__main__":
    main()
