"""
How closely a checkpoint of the authors' code is reproduced: against their recorded outputs, in float32 and bfloat16.

Reads the recording in `tests/fidelity` (a tiny random model; its README says how it was made).
"""

import json
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file

from mqt_llava import MqtLlavaForConditionalGeneration, MqtLlavaProcessor


FIDELITY = Path(__file__).parents[1] / "tests/fidelity"


@torch.no_grad()
def main() -> None:
    """Prints one row for each number format and number of visual tokens."""
    expected = json.loads((FIDELITY / "expected.json").read_text())
    tensors = load_file(FIDELITY / "expected.safetensors")
    processor = MqtLlavaProcessor.from_pretrained(FIDELITY / "checkpoint")
    image = Image.open(FIDELITY / "images/square.png")
    print("| weights | m | largest difference of logits | r.m.s. of their spread | same next token | same answer |")
    print("|---|--:|--:|--:|--:|--:|")
    for dtype in (torch.float32, torch.bfloat16):
        model = MqtLlavaForConditionalGeneration.from_pretrained(FIDELITY / "checkpoint", dtype=dtype)
        for m, tokens in expected["generated"].items():
            inputs = processor(images=image, text=expected["prompt"], num_visual_tokens=int(m), return_tensors="pt")
            theirs = tensors[f"logits.{m}"]
            ours = model(**inputs).logits.float()
            relative = (ours - theirs).pow(2).mean().sqrt() / theirs.std()
            alike = (ours.argmax(-1) == theirs.argmax(-1)).float().mean()
            output = model.generate(**inputs, num_visual_tokens=int(m), max_new_tokens=16)
            answer = output[0, inputs["input_ids"].shape[1] :].tolist()
            same = next((i for i, (a, b) in enumerate(zip(answer, tokens[1:])) if a != b), 16)
            largest = (ours - theirs).abs().max()
            print(f"| {dtype} | {m} | {largest:.1e} | {relative:.1e} | {alike:.0%} | first {same} of 16 |")


if __name__ == "__main__":
    main()
