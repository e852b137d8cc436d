"""Checkpoints from strangers: nothing in them runs, leaves its folder, or takes the machine down."""

import json
import os
import pickle
import struct

import pytest
import torch
from conftest import tiny_config, tiny_model, tiny_processor
from huggingface_hub.errors import StrictDataclassError
from released import FIDELITY, whole_weights, write
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from mqt_llava import MqtLlavaConfig, MqtLlavaForConditionalGeneration, MqtLlavaProcessor
from mqt_llava.conversion.convert import convert
from mqt_llava.hub import add_code


class Bomb:
    """Runs a command when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def load(folder):
    return MqtLlavaForConditionalGeneration.from_pretrained(folder)


def convert_there(folder):
    return convert(folder, folder.parent / "out")


WAYS = pytest.mark.parametrize("way", [load, convert_there])


@WAYS
@pytest.mark.parametrize("save", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_pickle_that_runs_something_is_refused_unrun(tmp_path, way, save):
    source = write(tmp_path / "source", {"lm_head.weight": torch.zeros(1)})
    (source / "model.safetensors").unlink()
    save({"lm_head.weight": Bomb(tmp_path / "boom")}, source / "pytorch_model.bin")
    with pytest.raises(ValueError, match="refused without running"):
        way(source)
    assert not (tmp_path / "boom").exists()
    assert not (tmp_path / "out").exists()


def test_pickled_weights_of_our_own_layout_are_refused_unrun(tmp_path):
    tiny_model().save_pretrained(tmp_path / "own")
    (tmp_path / "own/model.safetensors").unlink()
    torch.save({"lm_head.weight": Bomb(tmp_path / "boom")}, tmp_path / "own/pytorch_model.bin")
    with pytest.raises(pickle.UnpicklingError, match="[Ww]eights.only"):
        load(tmp_path / "own")
    assert not (tmp_path / "boom").exists()


@pytest.mark.parametrize("name", ["query_abstractor.bin", "non_lora_trainables.bin"])
def test_pickled_parts_are_refused_unrun(tmp_path, name):
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text((FIDELITY / "checkpoint/config.json").read_text())
    torch.save({"x": Bomb(tmp_path / "boom")}, source / name)
    if name == "non_lora_trainables.bin":
        (source / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 1}))
        save_file({}, source / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="refused without running"):
        convert(source, tmp_path / "out", base_model=FIDELITY / "checkpoint", vision_tower=FIDELITY / "clip")
    assert not (tmp_path / "boom").exists()


def test_damaged_safetensors_are_refused(tmp_path):
    source = write(tmp_path / "source", whole_weights())
    path = source / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="damaged"):
        convert(source, tmp_path / "out")
    path.write_bytes(struct.pack("<Q", 2**60) + b"{}")
    with pytest.raises(ValueError, match="damaged"):
        load(source)


def test_code_in_a_repository_is_not_run_unasked(tmp_path):
    tiny_model().save_pretrained(tmp_path / "own")
    tiny_processor().save_pretrained(tmp_path / "own")
    add_code(tmp_path / "own")
    for file in (tmp_path / "own").glob("*.py"):
        file.write_text(f"open({str(tmp_path / 'boom')!r}, 'w')\n" + file.read_text())
    config = json.loads((tmp_path / "own/config.json").read_text())
    AutoModelForImageTextToText.from_pretrained(tmp_path / "own")  # the installed classes win
    AutoProcessor.from_pretrained(tmp_path / "own")
    (tmp_path / "own/config.json").write_text(json.dumps({**config, "model_type": "stranger"}))
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoConfig.from_pretrained(tmp_path / "own", trust_remote_code=False)
    assert not (tmp_path / "boom").exists()


@WAYS
@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "a/../../b.bin", "..\\outside.bin"])
def test_index_that_points_out_of_its_folder_is_refused(tmp_path, way, name):
    source = write(tmp_path / "source", whole_weights(), shards=2)
    save_file(whole_weights(), tmp_path / "outside.safetensors")
    index = source / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["lm_head.weight"] = name
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="refused"):
        way(source)


def test_own_index_that_points_out_of_its_folder_is_refused(tmp_path):
    tiny_model().save_pretrained(tmp_path / "own", max_shard_size="50KB")
    index = tmp_path / "own/model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["lm_head.weight"] = "../outside.safetensors"
    index.write_text(json.dumps(content))
    save_file({"lm_head.weight": torch.zeros(1)}, tmp_path / "outside.safetensors")
    with pytest.raises(ValueError, match="refused"):
        load(tmp_path / "own")


@pytest.mark.parametrize("name", ["../evil", "a/../../evil"])
def test_template_name_that_climbs_out_is_refused(tmp_path, name):
    processor = tiny_processor(chat_template={"default": "x", name: "evil"})
    with pytest.raises(ValueError, match="template"):
        processor.save_pretrained(tmp_path / "saved")
    assert not list(tmp_path.rglob("evil*"))


@pytest.mark.parametrize(
    "change",
    [
        {"max_visual_tokens": 10**9},
        {"max_visual_tokens": -4},
        {"query_num_attention_heads": -1},
        {"text": {"num_hidden_layers": -1}},
        {"text": {"num_hidden_layers": 10**9}},
        {"text": {"num_attention_heads": 0}},
        {"text": {"hidden_size": 10**12}},
        {"text": {"vocab_size": 10**12}},
        {"text": {"intermediate_size": 10**12}},
        {"vision": {"num_hidden_layers": 10**9}},
        {"vision": {"image_size": 10**9}},
        {"vision": {"hidden_size": 4 * 10**11}},
        {"vision": {"patch_size": 0}},
    ],
    ids=str,
)
def test_absurd_sizes_are_refused_before_anything_is_built(tmp_path, change):
    tiny_model().save_pretrained(tmp_path / "own")
    path = tmp_path / "own/config.json"
    config = json.loads(path.read_text())
    config["text_config"].update(change.pop("text", {}))
    config["vision_config"].update(change.pop("vision", {}))
    path.write_text(json.dumps({**config, **change}))
    with pytest.raises((ValueError, StrictDataclassError), match="must be"):
        load(tmp_path / "own")
    with pytest.raises((ValueError, StrictDataclassError), match="must be"):
        MqtLlavaConfig.from_pretrained(tmp_path / "own")


@WAYS
@pytest.mark.parametrize(
    "change",
    [
        {"num_hidden_layers": -1},
        {"num_hidden_layers": 10**9},
        {"hidden_size": 10**12},
        {"vocab_size": 10**12},
        {"intermediate_size": 10**7},
        {"num_attention_heads": 0},
        {"num_key_value_heads": -4},
        {"max_position_embeddings": -1},
        {"mm_vision_select_layer": 99},
        {"mm_vision_select_layer": "last"},
    ],
    ids=str,
)
def test_absurd_sizes_in_a_config_of_the_authors_are_refused(tmp_path, way, change):
    source = write(tmp_path / "source", whole_weights(), **change)
    with pytest.raises((ValueError, StrictDataclassError)):
        way(source)


@WAYS
@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"model_type": 3}'])
def test_broken_config_is_one_clear_error(tmp_path, way, text):
    source = write(tmp_path / "source", whole_weights())
    (source / "config.json").write_text(text)
    with pytest.raises((ValueError, OSError)):
        way(source)


def test_processor_of_absurd_size_is_refused(tmp_path):
    tiny_processor().save_pretrained(tmp_path / "own")
    path = tmp_path / "own/processor_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "max_visual_tokens": 10**9}))
    with pytest.raises(ValueError, match="max_visual_tokens"):
        MqtLlavaProcessor.from_pretrained(tmp_path / "own")


def test_sane_config_is_not_refused():
    assert tiny_config().max_visual_tokens == 16
    MqtLlavaConfig()
