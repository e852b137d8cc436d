import copy
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from training_helpers import M, conversation, conversations, tiny_model, tiny_processor
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from mqt_llava import MqtLlavaProcessor
from mqt_llava.conversion.processor import released_tokenizer
from mqt_llava.processing_mqt_llava import PLAIN_CHAT_TEMPLATE, VICUNA_V1_CHAT_TEMPLATE
from mqt_llava.training.conversations import BadRecord, ConversationCollator, ConversationEncoder
from mqt_llava.training.draws import parse_draw
from mqt_llava.training.records import conversation_of


FIDELITY = Path(__file__).parent / "fidelity"
TRAINING_ROWS = [
    row for row in json.loads((FIDELITY / "prompts.json").read_text()) if row["template"] in ("v1", "plain")
]


def encode_as_recorded(row):
    """With a processor as a conversion makes it: the tokenizer of a Llama, a template for each stage."""
    images = LlavaImageProcessorPil(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})
    processor = MqtLlavaProcessor(
        images,
        released_tokenizer(FIDELITY / "tokenizer", 640, row["legacy"]),
        chat_template={"default": VICUNA_V1_CHAT_TEMPLATE, "plain": PLAIN_CHAT_TEMPLATE},
        max_visual_tokens=1,
    )
    with_image = any("<image>" in turn["value"] for turn in row["conversation"])
    record = {"conversations": row["conversation"], **({"image": "x.png"} if with_image else {})}
    example = conversation_of(record)
    example["images"] = [Image.new("RGB", (24, 24)) for _ in example["images"]]
    encoded = ConversationEncoder(processor, chat_template="plain" if row["template"] == "plain" else None)(example)
    ids = encoded["input_ids"].masked_fill(encoded["input_ids"] == processor.image_token_id, -200)
    return ids.tolist(), encoded["labels"].tolist()


@pytest.mark.parametrize("row", TRAINING_ROWS)
def test_ids_and_labels_are_those_of_the_authors_code(row):
    ids, labels = encode_as_recorded(row)
    assert ids == row["input_ids"]
    assert labels == row["labels"]


def test_loss_is_on_answers_and_their_end_token_alone():
    processor = tiny_processor()
    row = ConversationEncoder(processor)(conversation(3))
    learned = row["labels"][row["labels"] != -100]
    assert processor.tokenizer.decode(learned) == " It is 3.</s>"


def test_several_answers_are_all_learned():
    example = conversation(3)
    example["messages"] += [
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": "No."},
    ]
    row = ConversationEncoder(tiny_processor())(example)
    assert int((row["labels"] == 2).sum()) == 2  # two end tokens


def test_the_collator_leaves_the_examples_as_they_were():
    examples = conversations(3)
    before = copy.deepcopy(examples)
    ConversationCollator(tiny_processor())(examples)
    assert [example["messages"] for example in examples] == [example["messages"] for example in before]
    assert all(a.tobytes() == b.tobytes() for x, y in zip(examples, before) for a, b in zip(x["images"], y["images"]))


def test_a_batch_gives_the_losses_of_its_rows_one_by_one():
    collate, model = ConversationCollator(tiny_processor()), tiny_model().eval()
    examples = [conversation(1), conversation(2, images=0), conversation(3, images=2)]
    with torch.no_grad():
        together = model(**collate(examples), num_items_in_batch=1).loss
        alone = sum(model(**collate([example]), num_items_in_batch=1).loss for example in examples)
    torch.testing.assert_close(together, alone)


@pytest.mark.parametrize("cut", [1, 3, 8])
def test_too_long_a_row_loses_text_on_the_right(cut):
    processor = tiny_processor()
    whole = ConversationEncoder(processor)(conversation(2, answer="x" * 20))
    length = len(whole["input_ids"]) - cut
    row = ConversationEncoder(processor, max_length=length)(conversation(2, answer="x" * 20))
    assert row["input_ids"].tolist() == whole["input_ids"][:length].tolist()
    assert row["labels"].tolist() == whole["labels"][:length].tolist()
    assert int((row["input_ids"] == 4).sum()) == M


@pytest.mark.parametrize("max_length", [1, 5, 20])
def test_an_image_is_never_cut(max_length):
    with pytest.raises(BadRecord, match="Raise `max_length`"):
        ConversationEncoder(tiny_processor(), max_length=max_length)(conversation(2))


def test_a_row_without_anything_to_learn_is_refused():
    with pytest.raises(BadRecord, match="no answer begins"):
        ConversationEncoder(tiny_processor(), max_length=30)(conversation(2))


def test_as_many_images_as_placeholders_are_needed():
    example = conversation(1)
    example["images"] = []
    with pytest.raises(BadRecord, match="1 in the text for 0 images"):
        ConversationCollator(tiny_processor())([example])


def test_a_template_without_marked_answers_raises():
    with pytest.raises(ValueError, match="generation"):
        ConversationEncoder(tiny_processor(), chat_template="{{ messages }}")


def test_a_collator_takes_one_budget_per_batch():
    with pytest.raises(ValueError, match="MqtLlavaTrainer"):
        ConversationCollator(tiny_processor(), draw=parse_draw("sandwich", M))


def test_workers_draw_otherwise_from_each_other():
    collate = ConversationCollator(tiny_processor(), draw=parse_draw("uniform_all", M))
    torch.manual_seed(0)
    loader = DataLoader(conversations(16), batch_size=1, collate_fn=collate, num_workers=2)
    budgets = [int(batch["visual_token_counts"][0]) for batch in loader]
    assert budgets[0::2] != budgets[1::2]
    assert len(set(budgets)) > 2
