"""Checkpoints of the authors' code load, convert, and answer as they did there."""

import json
import os

import pytest
import torch
from PIL import Image
from released import FIDELITY, TOWER, language_model, lora_run, whole_weights, without_tower, write
from safetensors.torch import load_file

from mqt_llava import MqtLlavaConfig, MqtLlavaForConditionalGeneration, MqtLlavaProcessor
from mqt_llava.cli import main
from mqt_llava.conversion.convert import convert


EXPECTED = json.loads((FIDELITY / "expected.json").read_text())
TENSORS = load_file(FIDELITY / "expected.safetensors")
CLIP = FIDELITY / "clip"
BUDGETS = [1, 2, 3, 5, 8, 16]


def load(folder, **kwargs):
    return (
        MqtLlavaForConditionalGeneration.from_pretrained(folder, **kwargs),
        MqtLlavaProcessor.from_pretrained(folder, **kwargs),
    )


def converted(source, folder, **kwargs):
    return load(convert(source, folder / "converted", **kwargs))


def inside(folder):
    return load(FIDELITY / "checkpoint")


def outside(folder):
    return load(FIDELITY / "checkpoint_without_vision", vision_tower=str(CLIP))


def inside_converted(folder):
    return converted(FIDELITY / "checkpoint", folder)


def outside_converted(folder):
    return converted(FIDELITY / "checkpoint_without_vision", folder, vision_tower=CLIP)


def tower_named_by_the_config(folder):
    return load(write(folder / "named", without_tower(whole_weights()), mm_vision_tower=str(CLIP)))


def sharded(folder):
    return load(write(folder / "sharded", whole_weights(), shards=3))


def sharded_converted(folder):
    return converted(write(folder / "sharded", whole_weights(), shards=3), folder, shard_bytes=100_000)


def sharded_pickles(folder):
    return load(write(folder / "pickles", whole_weights(), pickled=True, shards=2))


def sharded_pickles_converted(folder):
    return converted(write(folder / "pickles", whole_weights(), pickled=True, shards=2), folder)


def first_stage_file(folder):
    base = language_model(folder / "llama")
    weights, processor = converted(FIDELITY / "query_abstractor.bin", folder, base_model=base, vision_tower=CLIP)
    assert processor.image_processor.do_pad is False  # as in the first stage
    processor.image_processor.do_pad = True
    return weights, processor


def first_stage_folder(folder):
    stage = write(folder / "stage", {})
    (stage / "model.safetensors").unlink()
    os.link(FIDELITY / "query_abstractor.bin", stage / "query_abstractor.bin")
    return converted(stage, folder, base_model=language_model(folder / "llama"), vision_tower=CLIP)


def whole_clip_of_old(folder):
    """The tower inside a two-tower model, saved by an old version: with its text half, buffers and a full config."""
    clip = load_file(CLIP / "model.safetensors")
    others = {
        "logit_scale": torch.zeros(()),
        "text_model.final_layer_norm.weight": torch.zeros(4),
        "text_projection.weight": torch.zeros(4, 4),
        "visual_projection.weight": torch.zeros(4, 32),
        "vision_model.embeddings.position_ids": torch.arange(37)[None],
    }
    (folder / "clip").mkdir()
    torch.save({**clip, **others}, folder / "clip/pytorch_model.bin")
    vision = json.loads((CLIP / "config.json").read_text())
    dump = {
        "return_dict": True,
        "pruned_heads": {},
        "use_bfloat16": False,
        "id2label": {"0": "LABEL_0"},
        "dropout": 0.0,
    }
    (folder / "clip/config.json").write_text(json.dumps({"model_type": "clip", "vision_config": {**vision, **dump}}))
    source = write(folder / "source", without_tower(whole_weights()), mm_vision_tower=str(folder / "clip"))
    direct, _ = load(source)
    model, processor = converted(source, folder)
    inputs = encode(processor, 2)
    assert torch.equal(direct(**inputs).logits, model(**inputs).logits)
    return model, processor


def saved_and_loaded(folder):
    for part in inside(folder):
        part.save_pretrained(folder / "saved")
    return load(folder / "saved")


WAYS = [
    inside,
    outside,
    inside_converted,
    outside_converted,
    tower_named_by_the_config,
    sharded,
    sharded_converted,
    sharded_pickles,
    sharded_pickles_converted,
    first_stage_file,
    first_stage_folder,
    whole_clip_of_old,
    saved_and_loaded,
]


@pytest.fixture(scope="module", params=WAYS, ids=lambda way: way.__name__)
def loaded(request, tmp_path_factory):
    return request.param(tmp_path_factory.mktemp(request.param.__name__))


def pictures(names=EXPECTED["images"]):
    return [Image.open(FIDELITY / f"images/{name}.png") for name in names]


def encode(processor, num_visual_tokens):
    return processor(
        images=pictures()[:1], text=EXPECTED["prompt"], num_visual_tokens=num_visual_tokens, return_tensors="pt"
    )


@pytest.mark.parametrize("num_visual_tokens", BUDGETS)
def test_greedy_tokens_are_the_recorded_ones(loaded, num_visual_tokens):
    model, processor = loaded
    inputs = encode(processor, num_visual_tokens)
    output = model.generate(**inputs, num_visual_tokens=num_visual_tokens, max_new_tokens=16)
    assert [1, *output[0, inputs["input_ids"].shape[1] :].tolist()] == EXPECTED["generated"][str(num_visual_tokens)]


@pytest.mark.parametrize("num_visual_tokens", BUDGETS)
def test_logits_are_the_recorded_ones(loaded, num_visual_tokens):
    model, processor = loaded
    logits = model(**encode(processor, num_visual_tokens)).logits
    torch.testing.assert_close(logits, TENSORS[f"logits.{num_visual_tokens}"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("num_visual_tokens", BUDGETS)
def test_visual_tokens_are_the_recorded_ones(loaded, num_visual_tokens):
    model, processor = loaded
    pixels = processor.image_processor(pictures(), return_tensors="pt")["pixel_values"]
    output = model.get_image_features(pixels, torch.full((3,), num_visual_tokens), return_dict=True)
    expected = TENSORS[f"visual_tokens.{num_visual_tokens}"]
    torch.testing.assert_close(torch.stack(list(output.pooler_output)), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("num_visual_tokens", [1, 2, 8, 16])
def test_losses_are_the_recorded_ones(loaded, num_visual_tokens):
    model, processor = loaded
    ids, mask, labels = (TENSORS[f"train.{name}"] for name in ("input_ids", "attention_mask", "labels"))
    repeats = torch.where(ids == -200, num_visual_tokens, 1)
    rows = [
        [row.repeat_interleave(times) for row, times in zip(tensor, repeats)]
        for tensor in (ids.masked_fill(ids == -200, model.config.image_token_id), mask, labels)
    ]
    ids, mask, labels = (
        torch.nn.utils.rnn.pad_sequence(tensor, True, value) for tensor, value in zip(rows, (0, 0, -100))
    )
    pixels = processor.image_processor(pictures(["square", "wide"]), return_tensors="pt")["pixel_values"]
    loss = model(input_ids=ids, attention_mask=mask, labels=labels, pixel_values=pixels).loss
    assert abs(loss.item() - EXPECTED["loss"][str(num_visual_tokens)]) < 1e-5


def test_command_line_converts_what_then_answers_as_recorded(tmp_path, capsys):
    source = str(FIDELITY / "checkpoint_without_vision")
    assert main(["convert", source, str(tmp_path / "out"), "--vision-tower", str(CLIP)]) == 0
    assert "Converted" in capsys.readouterr().out
    model, processor = load(tmp_path / "out")
    inputs = encode(processor, 5)
    output = model.generate(**inputs, num_visual_tokens=5, max_new_tokens=16)
    assert output[0, inputs["input_ids"].shape[1] :].tolist() == EXPECTED["generated"]["5"][1:]


@pytest.mark.parametrize("pickled", [False, True])
def test_lora_run_converts_to_the_merged_model(tmp_path, pickled):
    base = language_model(tmp_path / "llama")
    weights = lora_run(tmp_path / "lora", base)
    if pickled:
        adapter = tmp_path / "lora/adapter_model.safetensors"
        torch.save(load_file(adapter), tmp_path / "lora/adapter_model.bin")
        adapter.unlink()
    model, processor = converted(tmp_path / "lora", tmp_path, vision_tower=CLIP)
    expected, _ = load(write(tmp_path / "merged", weights, mm_vision_tower=str(CLIP)))
    inputs = encode(processor, 8)
    torch.testing.assert_close(model(**inputs).logits, expected(**inputs).logits, rtol=0, atol=1e-5)
    assert (model(**inputs).logits - TENSORS["logits.8"]).abs().max() > 0.1  # the adapter does something


@pytest.mark.parametrize("setting", [{"use_dora": True}, {"bias": "all"}, {"r": 0}, {"alpha_pattern": {"x": 1}}])
def test_adapters_that_are_not_plain_lora_are_refused(tmp_path, setting):
    base = language_model(tmp_path / "llama")
    lora_run(tmp_path / "lora", base, **setting)
    with pytest.raises(ValueError, match=f"`{next(iter(setting))}`"):
        convert(tmp_path / "lora", tmp_path / "out", vision_tower=CLIP)


def spoil_missing(weights):
    del weights["model.layers.1.mlp.up_proj.weight"]
    return "missing: model.language_model.layers.1.mlp.up_proj.weight"


def spoil_unexpected(weights):
    weights["model.layers.1.mlp.extra.weight"] = torch.zeros(2)
    return "unexpected: model.language_model.layers.1.mlp.extra.weight"


def spoil_shape(weights):
    weights["model.query_abstractor.proj"] = torch.zeros(32, 47)
    return r"wrong shape: model.query_transformer.proj \(is \(32, 47\), must be \(32, 48\)\)"


def spoil_tower(weights):
    del weights[TOWER + "vision_tower.vision_model.encoder.layers.0.mlp.fc2.bias"]
    return "missing: model.vision_tower.encoder.layers.0.mlp.fc2.bias"


SPOILS = [spoil_missing, spoil_unexpected, spoil_shape, spoil_tower]


@pytest.mark.parametrize("spoil", SPOILS)
@pytest.mark.parametrize("way", [MqtLlavaForConditionalGeneration.from_pretrained, convert], ids=["load", "convert"])
def test_checkpoint_that_does_not_fit_is_refused_with_its_keys(tmp_path, spoil, way):
    weights = whole_weights()
    complaint = spoil(weights)
    source = write(tmp_path / "spoilt", weights)
    with pytest.raises(ValueError, match=complaint):
        way(source, *([tmp_path / "out"] if way is convert else []))
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("name", ["model.query_transformer.proj", "lm_head.weight"])
def test_own_checkpoint_with_a_missing_key_is_refused(tmp_path, name):
    inside(tmp_path)[0].save_pretrained(tmp_path / "own")
    weights = load_file(tmp_path / "own/model.safetensors")
    del weights[name]
    from safetensors.torch import save_file

    save_file(weights, tmp_path / "own/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"missing: {name}"):
        MqtLlavaForConditionalGeneration.from_pretrained(tmp_path / "own")


def test_saving_never_writes_the_authors_names(tmp_path):
    model, _ = inside(tmp_path)
    model.save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved/model.safetensors")
    assert saved.keys() == model.state_dict().keys()
    with pytest.raises(ValueError, match="save_original_format"):
        model.save_pretrained(tmp_path / "other", save_original_format=True)


def test_converted_weights_are_the_source_bit_for_bit(tmp_path):
    convert(FIDELITY / "checkpoint", tmp_path / "out", shard_bytes=50_000)
    ours = {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        ours |= load_file(file)
    theirs = whole_weights()
    packed = [ours[f"model.query_transformer.attn.{part}_proj.weight"] for part in "qkv"]
    assert torch.equal(torch.cat(packed), theirs["model.query_abstractor.attn.in_proj_weight"])
    assert torch.equal(ours["model.language_model.norm.weight"], theirs["model.norm.weight"])
    assert not any("layers.2" in name and "vision" in name for name in ours)  # above the layer that is read


def test_strings_for_the_budget_mean_nothing(tmp_path):
    model, processor = load(write(tmp_path / "source", whole_weights(), num_visual_tokens="second_stage"))
    assert getattr(model.generation_config, "num_visual_tokens", None) is None
    assert processor.num_visual_tokens is None
    first, second = (model.generate(**encode(processor, None), max_new_tokens=4) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("way", [load, lambda source: converted(source, source.parent)], ids=["load", "convert"])
def test_numbers_for_the_budget_become_the_default(tmp_path, way):
    model, processor = way(write(tmp_path / "source", whole_weights(), num_visual_tokens=5))
    assert model.generation_config.num_visual_tokens == 5
    assert processor.num_visual_tokens == 5


def test_arguments_of_the_processor_win_over_the_checkpoint():
    processor = MqtLlavaProcessor.from_pretrained(FIDELITY / "checkpoint", num_visual_tokens=3, legacy=True)
    assert processor.num_visual_tokens == 3
    assert processor.tokenizer.backend_tokenizer.pre_tokenizer is None


def test_query_heads_of_the_released_width_are_sixteen(caplog):
    from mqt_llava.conversion.released import num_heads

    assert num_heads(1024, "heads") == 16
    assert not caplog.records


@pytest.mark.parametrize(
    "setting", [{"mm_use_im_start_end": True}, {"mm_patch_merge_type": "spatial"}, {"image_aspect_ratio": "anyres"}]
)
def test_settings_that_are_not_computed_here_are_refused(tmp_path, setting):
    source = write(tmp_path / "source", whole_weights(), **setting)
    with pytest.raises(ValueError, match=f"`{next(iter(setting))}`"):
        convert(source, tmp_path / "out")


def test_missing_tower_is_asked_for(tmp_path):
    source = write(tmp_path / "source", without_tower(whole_weights()), mm_vision_tower="")
    with pytest.raises(ValueError, match="vision_tower"):
        convert(source, tmp_path / "out")


def test_first_stage_without_its_language_model_asks_for_it(tmp_path):
    with pytest.raises(ValueError, match="base_model"):
        convert(FIDELITY / "query_abstractor.bin", tmp_path / "out", vision_tower=CLIP)


def test_destination_with_files_is_left_alone(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="empty"):
        convert(FIDELITY / "checkpoint", tmp_path / "out")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine.txt"]


def test_config_of_the_authors_is_not_taken_for_ours():
    with pytest.raises(ValueError, match="llava_llama"):
        MqtLlavaConfig.from_pretrained(FIDELITY / "checkpoint")


def test_bfloat16_agrees_as_far_as_its_digits_go():
    model, processor = load(FIDELITY / "checkpoint")
    inputs = encode(processor, 8)
    logits = model.to(torch.bfloat16)(**inputs).logits.float()
    spread = TENSORS["logits.8"].std()
    assert ((logits - TENSORS["logits.8"]).pow(2).mean().sqrt() / spread) < 0.05
