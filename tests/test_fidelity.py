"""What the authors' code computes, recorded from it, against what this package computes from the same weights."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mqt_llava import MqtLlavaConfig, MqtLlavaForConditionalGeneration


GOLDENS = Path(__file__).parent / "fidelity"
BUDGETS = [1, 2, 3, 5, 8, 16]
IMAGE = 640  # outside the vocabulary, like the authors' -200


@pytest.fixture(scope="module")
def expected():
    return load_file(GOLDENS / "expected.safetensors")


@pytest.fixture(scope="module")
def recorded():
    return json.loads((GOLDENS / "expected.json").read_text())


@pytest.fixture(scope="module")
def model():
    legacy = json.loads((GOLDENS / "checkpoint" / "config.json").read_text())
    text = {
        name: legacy[name]
        for name in (
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "vocab_size",
            "max_position_embeddings",
            "rms_norm_eps",
        )
    }
    config = MqtLlavaConfig(
        vision_config=json.loads((GOLDENS / "clip" / "config.json").read_text()),
        text_config={"model_type": "llama", **text},
        image_token_index=IMAGE,
        max_visual_tokens=16,
        query_num_attention_heads=4,
    )
    model = MqtLlavaForConditionalGeneration(config).eval()
    weights = by_our_names(load_file(GOLDENS / "checkpoint" / "model.safetensors"))
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert missing == []
    assert all("encoder.layers.2." in name or "post_layernorm" in name for name in unexpected)  # above layer -2
    return model


def by_our_names(weights):
    renamed = {}
    for name, value in weights.items():
        name = name.replace("model.vision_tower.vision_tower.vision_model.", "model.vision_tower.")
        name = name.replace("query_abstractor", "query_transformer")
        for part in ("layers.", "norm.", "embed_tokens."):
            name = name.replace(f"model.{part}", f"model.language_model.{part}") if name[6:].startswith(part) else name
        if "in_proj_" in name:
            for letter, third in zip("qkv", value.chunk(3)):
                renamed[name.replace("in_proj_", f"{letter}_proj.")] = third
        else:
            renamed[name] = value
    return renamed


def prompt_at(ids, budget):
    """The recorded prompt with its one image mark as `budget` placeholders."""
    return torch.tensor([[i for token in row for i in ([IMAGE] * budget if token == -200 else [token])] for row in ids])


def test_vision_features_are_the_authors(model, expected):
    features = model.get_image_features(expected["pixel_values"]).last_hidden_state
    torch.testing.assert_close(features, expected["vision_features"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("budget", BUDGETS)
def test_visual_tokens_are_the_authors(model, expected, budget):
    tokens = model.get_image_features(expected["pixel_values"], torch.tensor([budget] * 3)).pooler_output
    torch.testing.assert_close(torch.stack(tokens), expected[f"visual_tokens.{budget}"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("budget", BUDGETS)
def test_logits_are_the_authors(model, expected, budget):
    ids = prompt_at(expected["prompt_ids"].tolist(), budget)
    logits = model(ids, expected["pixel_values"][:1]).logits
    torch.testing.assert_close(logits, expected[f"logits.{budget}"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("budget", BUDGETS)
def test_greedy_tokens_are_the_authors(model, expected, recorded, budget):
    ids = prompt_at(expected["prompt_ids"].tolist(), 16)
    output = model.generate(
        ids, pixel_values=expected["pixel_values"][:1], num_visual_tokens=budget, do_sample=False, max_new_tokens=16
    )
    assert output[0, ids.shape[1] :].tolist() == recorded["generated"][str(budget)][1:]  # theirs starts with a BOS


@pytest.mark.parametrize("budget", [1, 2, 8, 16])
def test_losses_are_the_authors(model, expected, recorded, budget):
    rows = []
    for ids, labels, mask in zip(
        *(expected[f"train.{name}"].tolist() for name in ("input_ids", "labels", "attention_mask"))
    ):
        kept = [(i, label) for i, label, m in zip(ids, labels, mask) if m]
        rows.append([pair for i, label in kept for pair in ([(IMAGE, -100)] * budget if i == -200 else [(i, label)])])
    longest = max(map(len, rows))
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    padded = torch.tensor([row + [(0, -100)] * (longest - len(row)) for row in rows])
    loss = model(padded[..., 0], expected["pixel_values"][:2], mask, labels=padded[..., 1]).loss
    assert loss.item() == pytest.approx(recorded["loss"][str(budget)], abs=1e-4)
