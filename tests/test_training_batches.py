import pytest
import torch
from training_helpers import M, conversation, conversations, tiny_model, tiny_processor

from mqt_llava.training.batches import IGNORED, trim_to_budget, with_blank_image, without_image_labels
from mqt_llava.training.conversations import ConversationCollator


IMAGE = 4


@pytest.fixture
def batch():
    examples = [*conversations(2), conversation(5, images=2), conversation(6, images=0)]
    return ConversationCollator(tiny_processor())(examples)


def native(batch, budget):
    """The slow truth: rows rebuilt token by token."""
    rows, labels = [], []
    for ids, row_labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"]):
        seen, kept = 0, []
        for position, token in enumerate(ids.tolist()):
            seen = seen + 1 if token == IMAGE else seen
            if mask[position] and not (token == IMAGE and (seen - 1) % M >= budget):
                kept.append(position)
        rows.append(ids[kept])
        labels.append(row_labels[kept])
    return rows, labels


@pytest.mark.parametrize("budget", [1, 2, 7, 15, 16])
def test_a_cut_batch_is_the_one_made_at_that_budget(batch, budget):
    cut = trim_to_budget(batch, budget, IMAGE, M)
    rows, labels = native(batch, budget)
    for i, (row, row_labels) in enumerate(zip(rows, labels)):
        assert cut["input_ids"][i, : len(row)].tolist() == row.tolist()
        assert cut["labels"][i, : len(row)].tolist() == row_labels.tolist()
        assert cut["attention_mask"][i].tolist() == [1] * len(row) + [0] * (cut["input_ids"].shape[1] - len(row))
        assert not (cut["input_ids"][i, len(row) :] == IMAGE).any()
    assert cut["visual_token_counts"].tolist() == [budget] * 4


def test_cutting_leaves_the_batch_as_it_was(batch):
    before = {name: value.clone() for name, value in batch.items()}
    trim_to_budget(batch, 3, IMAGE, M)
    assert all(torch.equal(before[name], batch[name]) for name in before)


def test_padding_on_the_left_gives_the_same_rows(batch):
    left = {name: value.flip(1) if value.shape == batch["labels"].shape else value for name, value in batch.items()}
    lengths = batch["attention_mask"].sum(-1)
    for name in ("input_ids", "labels", "attention_mask"):
        left[name] = torch.stack([row.roll(-int(length)) for row, length in zip(batch[name], lengths)])
    assert torch.equal(trim_to_budget(left, 3, IMAGE, M)["input_ids"], trim_to_budget(batch, 3, IMAGE, M)["input_ids"])


def test_other_columns_of_the_same_shape_are_cut_with_the_rest(batch):
    batch["token_type_ids"] = torch.ones_like(batch["input_ids"])
    cut = trim_to_budget(batch, 3, IMAGE, M)
    assert cut["token_type_ids"].tolist() == cut["attention_mask"].tolist()


def test_images_with_fewer_placeholders_keep_theirs():
    processor = tiny_processor()
    from training_helpers import picture

    batch = processor(
        images=[picture(0), picture(1)],
        text=["<image> a", "<image> b"],
        num_visual_tokens=[2, 9],
        padding=True,
        return_tensors="pt",
    )
    cut = trim_to_budget(dict(batch), 4, IMAGE, M)
    assert (cut["input_ids"] == IMAGE).sum(-1).tolist() == [2, 4]
    assert cut["visual_token_counts"].tolist() == [2, 4]


def test_text_alone_is_left_as_it_is():
    batch = ConversationCollator(tiny_processor())(conversations(2, images=0))
    assert trim_to_budget(batch, 2, IMAGE, M) is batch


@pytest.mark.parametrize("boolean", [False, True])
@pytest.mark.parametrize("budget", [1, 7])
def test_a_cut_batch_with_a_square_mask_gives_the_same_logits(batch, budget, boolean):
    """Rows with none, one and two images lose different numbers of placeholders."""
    model, mask = tiny_model().eval(), batch["attention_mask"].bool()
    seen = mask[:, None, None, :] & torch.ones(mask.shape[1], mask.shape[1], dtype=torch.bool).tril()
    seen |= torch.eye(mask.shape[1], dtype=torch.bool)
    square = seen if boolean else torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    positions = torch.arange(mask.shape[1]).expand_as(mask)
    cut = trim_to_budget({**batch, "attention_mask": square, "position_ids": positions}, budget, IMAGE, M)
    expected = trim_to_budget(batch, budget, IMAGE, M)
    with torch.no_grad():
        logits, reference = model(**cut).logits, model(**expected).logits
    real = expected["attention_mask"].bool()
    assert cut["input_ids"].shape[1] >= real.shape[1]
    torch.testing.assert_close(logits[:, : real.shape[1]][real], reference[real], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("extra", ["position_ids", "attention_mask"])
def test_what_cannot_follow_a_cut_raises(batch, extra):
    ids = batch["input_ids"]
    batch[extra] = ids if extra == "position_ids" else ids[:, None, None, :]
    with pytest.raises(ValueError, match=r"position_ids"):
        trim_to_budget(batch, 2, IMAGE, M)


def test_placeholders_of_no_whole_image_raise(batch):
    del batch["visual_token_counts"]
    batch["input_ids"][0, -1] = IMAGE
    with pytest.raises(ValueError, match="visual_token_counts"):
        trim_to_budget(batch, 2, IMAGE, M)


def test_placeholders_carry_no_label(batch):
    batch["labels"] = batch["input_ids"].clone()
    learned = without_image_labels(batch, IMAGE)["labels"] != IGNORED
    assert torch.equal(learned, batch["input_ids"] != IMAGE)


def test_a_blank_image_changes_neither_loss_nor_gradients():
    batch = ConversationCollator(tiny_processor())(conversations(3, images=0))
    model = tiny_model()
    plain = model(**batch).loss
    plain.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    walked = model(**with_blank_image(batch, IMAGE, (3, 24, 24))).loss
    walked.backward()
    torch.testing.assert_close(walked, plain)
    for name, parameter in model.named_parameters():
        if "query_transformer" in name:
            assert parameter.grad is not None, name
            assert not parameter.grad.any(), name
        elif name in gradients:
            torch.testing.assert_close(parameter.grad, gradients[name])
