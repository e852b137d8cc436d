"""One question about one image, answered at several budgets, with the compute that each prompt cost."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.image_utils import load_image


@dataclass(frozen=True)
class Answer:
    """What the model said with `num_visual_tokens`, and the floating-point operations of its prefill."""

    num_visual_tokens: int
    answer: str
    prefill_flops: int


def ask(
    model_name: str,
    image: str,
    question: str,
    budgets: Sequence[int] | None = None,
    max_new_tokens: int = 64,
) -> list[Answer]:
    """
    Greedy answers at several budgets; the tower runs once for all of them.

    Args:
        model_name (`str`): folder or Hub id of a model with its processor.
        image (`str`): path or URL.
        question (`str`): the user's turn.
        budgets (`Sequence[int]`, *optional*, defaults to the model's own): visual tokens of each answer.
        max_new_tokens (`int`, *optional*, defaults to 64): longest answer.

    Raises:
        ValueError: if a budget is not between 1 and M.
        OSError: if the model or the image cannot be read.
    """
    picture = load_image(image)
    processor = AutoProcessor.from_pretrained(model_name)
    model = AutoModelForImageTextToText.from_pretrained(model_name).eval()
    if budgets is None:
        default = getattr(model.generation_config, "num_visual_tokens", None)
        budgets = [default or processor.num_visual_tokens or processor.max_visual_tokens]
    content = [{"type": "image", "image": picture}, {"type": "text", "text": question}]

    def prompt(num_visual_tokens: int | None = None):
        return processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"num_visual_tokens": num_visual_tokens},
        )

    inputs = prompt()
    with torch.no_grad():
        features = {"image": model.get_image_features(inputs.pop("pixel_values"))}
    answers = []
    for budget in budgets:
        output = model.generate(
            **inputs,
            mm_encoder_outputs=features,
            num_visual_tokens=budget,
            do_sample=False,
            max_new_tokens=max_new_tokens,
        )
        said = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        answers.append(Answer(budget, said.strip(), count_prefill_flops(model, prompt(budget))))
    return answers


@torch.no_grad()
def count_prefill_flops(model, inputs) -> int:
    """
    Floating-point operations of reading a prompt, image included, up to the first answer token (torch's own counter:
    matrix products, convolutions and attention; a multiplication and an addition are two).
    """
    implementations = {name: config._attn_implementation for name, config in _configs(model).items()}
    model.set_attn_implementation("eager")  # the counter does not know the fused attention of the CPU
    try:
        with FlopCounterMode(display=False) as counter:
            model(**inputs, logits_to_keep=1)
    finally:
        model.set_attn_implementation(implementations)
    return counter.get_total_flops()


def _configs(model) -> dict:
    """The model's config under `""` and its sub-configs by name, as `set_attn_implementation` takes them."""
    return {"": model.config, **{name: getattr(model.config, name) for name in model.config.sub_configs}}
