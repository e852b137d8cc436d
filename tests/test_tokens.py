"""The same text becomes the same tokens, labels and pixels as in the authors' code."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llama_reference import IMAGE_ID, LlamaReference
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoProcessor, LlamaTokenizer
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from mqt_llava import MqtLlavaProcessor
from mqt_llava.conversion.processor import released_tokenizer
from mqt_llava.processing_mqt_llava import PLAIN_CHAT_TEMPLATE, VICUNA_V1_CHAT_TEMPLATE


FIDELITY = Path(__file__).parent / "fidelity"
ROWS = json.loads((FIDELITY / "prompts.json").read_text())
RED = Image.new("RGB", (24, 24), "red")
OTHER_SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)


def image_processor(do_pad=True, size=24):
    return LlavaImageProcessorPil(
        do_pad=do_pad, size={"shortest_edge": size}, crop_size={"height": size, "width": size}
    )


def make_processor(tokenizer):
    return MqtLlavaProcessor(
        image_processor(),
        tokenizer,
        chat_template={"default": VICUNA_V1_CHAT_TEMPLATE, "plain": PLAIN_CHAT_TEMPLATE},
        max_visual_tokens=16,
    )


def llamas_own_class(legacy):
    tokenizer = LlamaTokenizer.from_pretrained(FIDELITY / "tokenizer", legacy=legacy)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    return tokenizer


@pytest.fixture(scope="module", params=["ours", "llamas", "saved"])
def processors(request, tmp_path_factory):
    """
    By `legacy`: with the tokenizer as converted, with the one of Transformers, and as converted, saved and loaded.
    """
    if request.param == "llamas":
        return {legacy: make_processor(llamas_own_class(legacy)) for legacy in (True, False)}
    made = {legacy: make_processor(released_tokenizer(FIDELITY / "tokenizer", 640, legacy)) for legacy in (True, False)}
    if request.param == "ours":
        return made
    for legacy, processor in made.items():
        folder = tmp_path_factory.mktemp("processor")
        processor.save_pretrained(folder)
        made[legacy] = AutoProcessor.from_pretrained(folder)
        assert type(made[legacy]) is MqtLlavaProcessor
    return made


def messages_of(conversation):
    """As `preprocess_multimodal` in the authors' `train.py` moves the image to the front."""
    messages = []
    for turn in conversation:
        text, images = turn["value"], turn["value"].count("<image>")
        text = text.replace("<image>", "").strip() if images else text
        content = [{"type": "image", "image": RED}] * images + [{"type": "text", "text": text}]
        messages.append({"role": {"human": "user", "gpt": "assistant"}[turn["from"]], "content": content})
    return messages


def ids_of(processor, prompt):
    images = [RED] * prompt.count("<image>") or None
    ids = processor(images=images, text=prompt, num_visual_tokens=1)["input_ids"][0]
    return [IMAGE_ID if token == 640 else token for token in ids]


@pytest.mark.parametrize("row", [row for row in ROWS if "prompt" in row], ids=lambda row: row["template"])
def test_prompts_become_the_recorded_tokens(processors, row):
    assert ids_of(processors[row["legacy"]], row["prompt"]) == row["input_ids"]


@pytest.mark.parametrize("row", [row for row in ROWS if "prompt" in row], ids=lambda row: row["template"])
def test_chat_template_writes_the_recorded_prompts(processors, row):
    text = row["question"]
    messages = [{"role": "user", "content": [{"type": "text", "text": text}]}]
    if row["template"] == "generate_llava_v1":
        messages.insert(0, {"role": "system", "content": [{"type": "text", "text": OTHER_SYSTEM}]})
    processor = processors[row["legacy"]]
    assert processor.apply_chat_template(messages, add_generation_prompt=True) == row["prompt"]


@pytest.mark.parametrize("num_visual_tokens", [1, 3])
@pytest.mark.parametrize("row", [row for row in ROWS if "labels" in row], ids=lambda row: row["template"])
def test_conversations_become_the_recorded_tokens_and_labels(processors, row, num_visual_tokens):
    encoded = processors[row["legacy"]].apply_chat_template(
        messages_of(row["conversation"]),
        chat_template="plain" if row["template"] == "plain" else None,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        return_tensors=None,
        processor_kwargs={"num_visual_tokens": num_visual_tokens},
    )
    ids, mask = encoded["input_ids"][0], encoded["assistant_masks"][0]
    labels = [token if learned else -100 for token, learned in zip(ids, mask)]
    expected_ids, expected_labels = [], []
    for token, label in zip(row["input_ids"], row["labels"]):
        times = num_visual_tokens if token == IMAGE_ID else 1
        expected_ids += [640 if token == IMAGE_ID else token] * times
        expected_labels += [label] * times
    assert ids == expected_ids
    assert labels == expected_labels


@pytest.mark.parametrize("caption", ["日本 café", "\nnew line", " two spaces", "cat"])
@pytest.mark.parametrize("legacy", [True, False])
def test_every_token_of_a_caption_is_learned(processors, legacy, caption):
    messages = [
        {"role": "user", "content": [{"type": "image", "image": RED}]},
        {"role": "assistant", "content": caption},
    ]
    encoded = processors[legacy].apply_chat_template(
        messages,
        chat_template="plain",
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        return_tensors=None,
        processor_kwargs={"num_visual_tokens": 2},
    )
    reference = LlamaReference(FIDELITY / "tokenizer/tokenizer.model", legacy)
    expected = reference.with_images(f"<image>{caption}\n")
    assert [IMAGE_ID if token == 640 else token for token in encoded["input_ids"][0]][2:] == expected[1:]
    assert encoded["assistant_masks"][0] == [0, 0, 0] + [1] * (len(expected) - 2)


ODD_TEXT = st.text(
    alphabet=st.one_of(
        st.sampled_from("  \n\tabTheZ.,?'é日😀\u2581\u00a0"), st.characters(codec="utf-8", exclude_categories=["Cs"])
    ),
    max_size=30,
).map(lambda text: text.replace("\x00", ""))


@pytest.mark.parametrize("legacy", [True, False])
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_text_is_tokenized_as_by_the_authors(legacy, data):
    processor = CACHED.setdefault(legacy, make_processor(released_tokenizer(FIDELITY / "tokenizer", 640, legacy)))
    reference = REFERENCES.setdefault(legacy, LlamaReference(FIDELITY / "tokenizer/tokenizer.model", legacy))
    pieces = data.draw(st.lists(ODD_TEXT, min_size=1, max_size=4))
    glue = data.draw(st.lists(st.sampled_from(["<image>", "</s>"]), min_size=len(pieces) - 1, max_size=len(pieces) - 1))
    prompt = pieces[0] + "".join(token + piece for token, piece in zip(glue, pieces[1:]))
    assert ids_of(processor, prompt) == reference.with_images(prompt)


CACHED: dict = {}
REFERENCES: dict = {}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["template"])
def test_slow_truth_gives_the_recorded_tokens(row):
    if "prompt" in row:
        reference = LlamaReference(FIDELITY / "tokenizer/tokenizer.model", row["legacy"])
        assert reference.with_images(row["prompt"]) == row["input_ids"]


def test_placeholder_offsets_cover_the_placeholders_alone():
    processor = make_processor(released_tokenizer(FIDELITY / "tokenizer", 640))
    prompt = "a <image> b <image>c <image>"
    encoded = processor(
        images=[RED] * 3, text=prompt, num_visual_tokens=[2, 1, 3], return_text_replacement_offsets=True
    )
    offsets = encoded["text_replacement_offsets"][0]
    assert [offset["replacement"].count("<image>") for offset in offsets] == [2, 1, 3]
    expanded = "a <image><image>  b <image> c <image><image><image>"
    for offset in offsets:
        start, end = offset["new_span"]
        assert expanded[start:end] == offset["replacement"]


@pytest.mark.parametrize("mode", ["pad", "square"])
@pytest.mark.parametrize("size", [24, 112])
@pytest.mark.parametrize("name", ["square", "wide", "tall", "small"])
def test_pixels_are_the_recorded_ones_exactly(mode, size, name):
    expected = load_file(FIDELITY / "pixel_values.safetensors")[f"{mode}.{size}.{name}"]
    processor = CACHED.setdefault(False, make_processor(released_tokenizer(FIDELITY / "tokenizer", 640, False)))
    processor.image_processor = image_processor(do_pad=mode == "pad", size=size)
    image = Image.open(FIDELITY / f"images/{name}.png")
    pixels = processor(images=image, text="<image>", return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(pixels, expected, rtol=0, atol=0)
