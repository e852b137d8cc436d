"""
Time and compute to read one image and a short question, against LLaVA with the same tower and language model.

Random weights in the proportions of the 7B model, small enough for a CPU: a 24 x 24 grid of patches, M = 256 queries.
The last column reuses image features that were encoded once, as a sweep over budgets or a second question does.
"""

import argparse
import platform
import statistics
import time

import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from mqt_llava import MqtLlavaConfig, MqtLlavaForConditionalGeneration


IMAGE, QUESTION_LENGTH, BUDGETS = 31999, 40, (1, 4, 16, 36, 64, 144, 256)
VISION = {
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "image_size": 336,
    "patch_size": 14,
}
TEXT = {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "vocab_size": 32000,
}


def models() -> tuple[MqtLlavaForConditionalGeneration, LlavaForConditionalGeneration]:
    """Both models around towers and language models of one shape."""
    ours = MqtLlavaConfig(
        vision_config=CLIPVisionConfig(**VISION),
        text_config=LlamaConfig(**TEXT),
        image_token_index=IMAGE,
        query_num_attention_heads=4,
    )
    llava = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION), text_config=LlamaConfig(**TEXT), image_token_index=IMAGE
    )
    return MqtLlavaForConditionalGeneration(ours).eval(), LlavaForConditionalGeneration(llava).eval()


def prompt(num_visual_tokens: int) -> torch.Tensor:
    """`(1, S)` ids: placeholders, then a question."""
    return torch.tensor([[IMAGE] * num_visual_tokens + list(range(100, 100 + QUESTION_LENGTH))])


def seconds(run, repeats: int) -> float:
    """Median time of `run` after one call to warm up."""
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def gflops(model, run) -> float:
    """Floating-point operations of `run`, counted with eager attention, which the counter knows."""
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        run()
    model.set_attn_implementation("sdpa")
    return counter.get_total_flops() / 1e9


@torch.no_grad()
def main() -> None:
    """Prints a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    repeats = parser.parse_args().repeats
    torch.manual_seed(0)
    ours, llava = models()
    pixels = torch.randn(1, 3, 336, 336)
    features = {"image": ours.get_image_features(pixels)}
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, {versions}\n")
    print("| visual tokens | GFLOPs | prefill | features encoded before |\n|--|--|--|--|")
    for m in BUDGETS:
        ids = prompt(m)
        whole = lambda ids=ids: ours(ids, pixels, logits_to_keep=1)  # noqa: E731
        again = lambda ids=ids: ours(ids, mm_encoder_outputs=features, logits_to_keep=1)  # noqa: E731
        print(f"| {m} | {gflops(ours, whole):.1f} | {1e3 * seconds(whole, repeats):.0f} ms "
              f"| {1e3 * seconds(again, repeats):.0f} ms |")  # fmt: skip
    ids = prompt(576)
    whole = lambda: llava(ids, pixels, logits_to_keep=1)  # noqa: E731
    print(f"| 576 (LLaVA) | {gflops(llava, whole):.1f} | {1e3 * seconds(whole, repeats):.0f} ms | |")


if __name__ == "__main__":
    main()
