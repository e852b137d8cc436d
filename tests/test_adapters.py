"""PEFT adapters of this project's models: saved, pushed, loaded, merged, with the same answers all the way."""

import pytest
import torch
from conftest import picture, tiny_model, tiny_processor
from peft import LoraConfig, PeftModel, get_peft_model

from mqt_llava import MqtLlavaForConditionalGeneration
from mqt_llava.cli import main
from mqt_llava.conversion.adapters import merge


@pytest.fixture
def adapter(tmp_path):
    """Folders of a base and of an adapter whose every part differs from it, and the logits of both together."""
    tiny_model().save_pretrained(tmp_path / "base")
    tiny_processor().save_pretrained(tmp_path / "base")
    base = MqtLlavaForConditionalGeneration.from_pretrained(tmp_path / "base")
    settings = LoraConfig(
        r=4,
        init_lora_weights=False,
        target_modules=r".*language_model.*\.(q_proj|v_proj)",
        modules_to_save=["query_transformer"],
    )
    model = get_peft_model(base, settings).eval()
    with torch.no_grad():
        model.get_base_model().model.query_transformer.modules_to_save["default"].query.normal_()
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path, logits_of(model)


def logits_of(model):
    inputs = tiny_processor()(images=picture(), text="what is <image> this", num_visual_tokens=7, return_tensors="pt")
    with torch.no_grad():
        return model(**inputs).logits


def test_adapter_differs_from_its_base(adapter):
    folder, logits = adapter
    base = MqtLlavaForConditionalGeneration.from_pretrained(folder / "base")
    assert (logits_of(base) - logits).abs().max() > 0.1


def test_adapter_loads_onto_its_base(adapter):
    folder, logits = adapter
    base = MqtLlavaForConditionalGeneration.from_pretrained(folder / "base")
    torch.testing.assert_close(logits_of(PeftModel.from_pretrained(base, folder / "adapter").eval()), logits)


def test_adapter_folder_alone_loads_with_its_base(adapter):
    folder, logits = adapter
    model = MqtLlavaForConditionalGeneration.from_pretrained(folder / "adapter")
    torch.testing.assert_close(logits_of(model.eval()), logits)


def test_query_transformer_travels_with_the_adapter(adapter):
    from safetensors import safe_open

    folder, _ = adapter
    with safe_open(folder / "adapter/adapter_model.safetensors", "pt") as file:
        assert any("query_transformer" in name and name.endswith("query") for name in file.keys())  # noqa: SIM118
        assert not any("vision_tower" in name for name in file.keys())  # noqa: SIM118


def test_merging_keeps_the_logits(adapter):
    folder, logits = adapter
    assert main(["merge", str(folder / "adapter"), str(folder / "merged")]) == 0
    merged = MqtLlavaForConditionalGeneration.from_pretrained(folder / "merged")
    torch.testing.assert_close(logits_of(merged), logits, rtol=0, atol=1e-5)
    assert not any("lora" in name or "modules_to_save" in name for name in merged.state_dict())


def test_merging_onto_a_named_base(adapter):
    folder, logits = adapter
    (folder / "base").rename(folder / "moved")
    merge(folder / "adapter", folder / "merged", base_model=folder / "moved")
    merged = MqtLlavaForConditionalGeneration.from_pretrained(folder / "merged")
    torch.testing.assert_close(logits_of(merged), logits, rtol=0, atol=1e-5)
