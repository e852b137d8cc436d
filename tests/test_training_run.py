import contextlib
import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from training_helpers import tiny_processor, write_llava
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from mqt_llava import MqtLlavaForConditionalGeneration, MqtLlavaProcessor
from mqt_llava.cli import main
from mqt_llava.training.models import quantization_config
from mqt_llava.training.plots import budget_curves
from mqt_llava.training.recipe import ModelArguments, load_recipe
from mqt_llava.training.run import WORLD_SIZES, train, warn_if_left_alone
from mqt_llava.training.tiny import TinyRecords


TINY = Path(__file__).parents[1] / "recipes" / "tiny.yaml"
SHORT = "--max_steps 4 --save_steps 2 --eval_steps 2 --logging_steps 1 --per_device_train_batch_size 4 --disable_tqdm"


def words(folder, *more):
    return [str(TINY), "--output_dir", str(folder), *SHORT.split(), "--use_cpu", *more]


def history(folder, key):
    entries = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry[key] for entry in entries if key in entry}


def logits(model, processor):
    record = TinyRecords()[0]
    inputs = processor(images=record["images"], text="<image>\nWhat?", num_visual_tokens=4, return_tensors="pt")
    with torch.no_grad():
        return model.eval()(**inputs).logits


def test_the_tiny_recipe_trains_evaluates_and_loads(tmp_path, capsys):
    assert main(["train", *words(tmp_path)]) == 0
    assert "Trained model in" in capsys.readouterr().out
    for budget in (1, 2, 4, 16):
        assert set(history(tmp_path, f"eval_loss@{budget}")) == {2, 4}
    assert (tmp_path / "budgets.png").read_bytes()[:4] == b"\x89PNG"
    model = MqtLlavaForConditionalGeneration.from_pretrained(tmp_path)
    processor = MqtLlavaProcessor.from_pretrained(tmp_path)
    record = TinyRecords()[0]
    inputs = processor(images=record["images"], text="<image>\nWhat?", return_tensors="pt")
    assert model.generate(**inputs, num_visual_tokens=2, max_new_tokens=2).shape[1] > inputs["input_ids"].shape[1]


def test_a_finished_folder_is_left_alone(tmp_path, capsys):
    main(["train", *words(tmp_path)])
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert main(["train", *words(tmp_path)]) == 2
    assert "--resume" in capsys.readouterr().err
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}


def test_overwriting_starts_anew(tmp_path):
    train(load_recipe(TINY, words(tmp_path)[1:]))
    first = history(tmp_path, "loss")
    train(load_recipe(TINY, [*words(tmp_path)[1:], "--overwrite"]))
    assert history(tmp_path, "loss") == first


@pytest.mark.parametrize("lora", [[], ["--lora"]], ids=["full", "lora"])
def test_a_run_is_resumed_where_it_was(tmp_path, lora):
    import shutil

    train(load_recipe(TINY, [*words(tmp_path)[1:], *lora]))
    name = "adapter_model.safetensors" if lora else "model.safetensors"
    losses, weights = history(tmp_path, "loss"), load_file(tmp_path / name)
    shutil.rmtree(tmp_path / "checkpoint-4")
    os.remove(tmp_path / name)
    train(load_recipe(TINY, [*words(tmp_path)[1:], *lora, "--resume"]))
    assert history(tmp_path, "loss") == losses
    assert all(torch.equal(value, weights[key]) for key, value in load_file(tmp_path / name).items())


def test_adapters_learn_little_and_merge_into_the_same_model(tmp_path):
    finished = train(load_recipe(TINY, [*words(tmp_path / "lora")[1:], "--lora"]))
    learning = {name for name, p in finished.trainer.model.named_parameters() if p.requires_grad}
    assert all("lora_" in n or "query_transformer" in n or "vision_tower" in n for n in learning)
    assert any("query_transformer.modules_to_save" in n for n in learning)
    assert not any("vision_tower" in n and "lora_" in n for n in learning)
    main(["merge", str(tmp_path / "lora"), str(tmp_path / "merged")])
    merged = MqtLlavaForConditionalGeneration.from_pretrained(tmp_path / "merged")
    processor = MqtLlavaProcessor.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(
        logits(merged, processor), logits(finished.trainer.model, processor), rtol=1e-4, atol=1e-5
    )
    base = MqtLlavaForConditionalGeneration.from_pretrained(tmp_path / "lora" / "base")
    assert not torch.equal(merged.model.query_transformer.query, base.model.query_transformer.query)


def test_activation_checkpointing_changes_no_number_with_adapters(tmp_path):
    for name, more in (("plain", []), ("saved", ["--activation_checkpointing"])):
        train(load_recipe(TINY, [*words(tmp_path / name)[1:], "--lora", "--trainable", "[language_model]", *more]))
    assert history(tmp_path / "plain", "loss") == pytest.approx(history(tmp_path / "saved", "loss"), rel=1e-6)
    plain, saved = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("plain", "saved"))
    assert any(value.any() for name, value in plain.items() if "lora_B" in name)
    for name, value in plain.items():
        torch.testing.assert_close(saved[name], value, rtol=1e-4, atol=1e-6)


def test_tensorboard_gets_the_loss_at_each_budget(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(load_recipe(TINY, [*words(tmp_path)[1:], "--report_to", "tensorboard"]))
    (events,) = tmp_path.rglob("events.out.tfevents*")
    found = EventAccumulator(str(events.parent)).Reload().Tags()["scalars"]
    assert {"eval/loss@16", "train/num_visual_tokens", "train/tokens_per_second"} <= set(found)


def test_trackio_gets_the_loss_at_each_budget(tmp_path):
    """In a process of its own: trackio reads where to write when it is imported."""
    pytest.importorskip("trackio")
    code = "import sys; from mqt_llava.cli import main; sys.exit(main(sys.argv[1:]))"
    more = ["--report_to", "trackio", "--project", "elastic"]
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio")}
    command = [sys.executable, "-c", code, "train", *words(tmp_path / "run"), *more]
    subprocess.run(command, check=True, capture_output=True, env=environment)
    with contextlib.closing(sqlite3.connect(tmp_path / "trackio" / "elastic.db")) as database:
        found = {key for (row,) in database.execute("SELECT metrics FROM metrics") for key in json.loads(row)}
    assert {"eval/loss@16", "train/num_visual_tokens", "train/tokens_per_second"} <= found


@pytest.mark.parametrize(
    "environment, left_alone",
    [
        ({"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1"}, True),
        ({"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1", "OMPI_COMM_WORLD_SIZE": "2"}, False),
        ({"ACCELERATE_USE_CPU": "True"}, False),
        ({"ACCELERATE_USE_CPU": "False", "MASTER_ADDR": "127.0.0.1"}, False),
    ],
)
def test_a_process_that_waits_for_others_in_vain_says_so(monkeypatch, caplog, environment, left_alone):
    for name in WORLD_SIZES:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    warn_if_left_alone()
    assert ("This is one process" in caplog.text) == left_alone


def test_quantized_weights_without_bitsandbytes_raise(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs bitsandbytes"):
        quantization_config(ModelArguments(quantization="4bit"))


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_adapters_learn_on_quantized_weights_and_merge_into_whole_ones(tmp_path, bits):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    base, adapter, merged = tmp_path / "base", tmp_path / "qlora", tmp_path / "merged"
    train(load_recipe(TINY, [*words(base)[1:], "--max_steps", "1", "--eval_strategy", "no"]))
    more = ["--model_name_or_path", str(base), "--lora", "--quantization", bits, "--eval_strategy", "no"]
    model = train(load_recipe(TINY, [*words(adapter)[1:], *more])).trainer.model
    kind = {"4bit": bitsandbytes.nn.Linear4bit, "8bit": bitsandbytes.nn.Linear8bitLt}[bits]
    quantized = {name for name, module in model.named_modules() if isinstance(module, kind)}
    assert quantized
    assert all("language_model" in name for name in quantized)
    main(["merge", str(adapter), str(merged)])
    before, after = (load_file(folder / "model.safetensors") for folder in (base, merged))
    for part in ("query_transformer.query", "language_model.layers.0.self_attn.q_proj.weight"):
        assert after[f"model.{part}"].dtype == torch.float32
        assert not torch.equal(after[f"model.{part}"], before[f"model.{part}"])


def test_a_model_made_in_the_run_is_quantized_too(tmp_path):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    more = ["--lora", "--quantization", "4bit", "--max_steps", "1", "--eval_strategy", "no"]
    model = train(load_recipe(TINY, [*words(tmp_path)[1:], *more])).trainer.model
    quantized = [module for module in model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    assert len(quantized) == 2 * 7  # the linear layers of two Llama layers
    assert (tmp_path / "base" / "config.json").is_file()


@pytest.fixture
def parts(tmp_path):
    """A tower and a language model, saved as others publish them."""
    vision = CLIPVisionConfig(
        hidden_size=128, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=24, patch_size=4
    )
    CLIPVisionModel(vision).save_pretrained(tmp_path / "tower")
    CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24}).save_pretrained(
        tmp_path / "tower"
    )
    tokenizer = tiny_processor().tokenizer
    text = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=len(tokenizer),
        max_position_embeddings=1024,
    )
    LlamaForCausalLM(text).save_pretrained(tmp_path / "language")
    tokenizer.save_pretrained(tmp_path / "language")
    return tmp_path


def both_stages(tmp_path, parts, *more):
    data, images = write_llava(tmp_path / "data", 8, text_only=(3,))
    (images / "5.png").write_bytes(b"broken")
    common = (
        f"use_cpu: true\nmax_steps: 2\nper_device_train_batch_size: 2\ndata: ['{data}']\nimage_folder: '{images}'\n"
    )
    (tmp_path / "one.yaml").write_text(
        f"{common}language_model: '{parts / 'language'}'\nvision_tower: '{parts / 'tower'}'\nmax_visual_tokens: 16\n"
        "stage: pretrain\nchat_template: plain\nimage_aspect: crop\ndraw: fixed(16)\n"
        f"output_dir: '{tmp_path / 'one'}'\n"
    )
    (tmp_path / "two.yaml").write_text(
        f"{common}model_name_or_path: '{tmp_path / 'one'}'\nimage_aspect: pad\ngroup_by_modality_length: true\n"
        f"output_dir: '{tmp_path / 'two'}'\n"
    )
    return [train(load_recipe(tmp_path / f"{name}.yaml", more)) for name in ("one", "two")]


def test_two_stages_from_a_tower_and_a_language_model(tmp_path, parts):
    first, _second = both_stages(tmp_path, parts)
    original = load_file(parts / "language" / "model.safetensors")
    stage_one, stage_two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    name = "layers.0.self_attn.q_proj.weight"
    assert torch.equal(stage_one[f"model.language_model.{name}"], original[f"model.{name}"])
    assert not torch.equal(stage_two[f"model.language_model.{name}"], original[f"model.{name}"])
    tower = load_file(parts / "tower" / "model.safetensors")
    layer = next(key for key in tower if key.endswith("encoder.layers.0.mlp.fc1.weight"))
    assert torch.equal(stage_two["model.vision_tower.encoder.layers.0.mlp.fc1.weight"], tower[layer])
    assert not torch.equal(stage_one["model.query_transformer.query"], stage_two["model.query_transformer.query"])
    assert "USER" in MqtLlavaProcessor.from_pretrained(tmp_path / "one").chat_template["default"]
    assert first.trainer.model.config.query_num_attention_heads == 2


def test_parts_of_today_make_a_model_that_trains(tmp_path):
    """SigLIP has no CLS token and a pooling head above its layers; Qwen3 ties its head and has no unknown token."""
    vision = SiglipVisionConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
    )
    SiglipVisionModel(vision).save_pretrained(tmp_path / "tower")
    SiglipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "tower")
    tokenizer = tiny_processor().tokenizer
    tokenizer.bos_token = tokenizer.unk_token = None
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(tmp_path / "language")
    text = Qwen3Config(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=len(tokenizer),
        tie_word_embeddings=True,
    )
    language = Qwen3ForCausalLM(text)
    language.save_pretrained(tmp_path / "language")
    recipe = load_recipe(
        TINY.with_name("modern.yaml"),
        [
            *f"--language_model {tmp_path / 'language'} --vision_tower {tmp_path / 'tower'} --use_cpu".split(),
            *[
                "--query_num_attention_heads",
                "2",
                "--max_visual_tokens",
                "9",
                "--data",
                "builtin:tiny",
                "--max_steps",
                "2",
            ],
            *f"--output_dir {tmp_path / 'out'} --bf16 false --report_to none --dataloader_num_workers 0".split(),
        ],
    )
    train(recipe)
    model = MqtLlavaForConditionalGeneration.from_pretrained(tmp_path / "out")
    processor = MqtLlavaProcessor.from_pretrained(tmp_path / "out")
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert "USER" in processor.chat_template["default"]
    assert processor.image_processor.do_pad
    assert logits(model, processor).isfinite().all()


def test_each_stage_sees_pictures_as_its_recipe_says(tmp_path, parts):
    both_stages(tmp_path, parts)
    wide = Image.new("RGB", (48, 24), (250, 0, 0))
    cropped, padded = (
        MqtLlavaProcessor.from_pretrained(tmp_path / name).image_processor(wide, return_tensors="pt")["pixel_values"][0]
        for name in ("one", "two")
    )
    top, middle = (0, 0), (12, 12)
    assert cropped.shape == padded.shape == (3, 24, 24)
    assert torch.equal(cropped[(slice(None), *top)], cropped[(slice(None), *middle)])
    assert padded[(slice(None), *top)].abs().max() < 0.02  # the mean colour
    torch.testing.assert_close(padded[(slice(None), *middle)], cropped[(slice(None), *middle)])


def test_skipped_records_are_told_at_the_end(tmp_path, parts):
    _, second = both_stages(tmp_path, parts, "--max_steps", "4")
    assert "broken image: 1" in second.skipped
    assert "data.json#5" in second.skipped
    assert "12.5% of the data" in second.skipped


def test_strict_data_stops_the_run(tmp_path, parts):
    with pytest.raises(ValueError, match="broken image"):
        both_stages(tmp_path, parts, "--strict_data", "--max_steps", "4")


def test_a_stream_trains(tmp_path):
    finished = train(load_recipe(TINY, [*words(tmp_path)[1:], "--streaming"]))
    assert finished.trainer.state.global_step == 4


def test_the_result_is_pushed_when_asked_for(tmp_path, monkeypatch):
    from mqt_llava.training.trainer import MqtLlavaTrainer

    pushed = []
    monkeypatch.setattr(MqtLlavaTrainer, "init_hf_repo", lambda self, **kwargs: None)
    monkeypatch.setattr("mqt_llava.training.run.push_result", lambda trainer: pushed.append(trainer.args.output_dir))
    monkeypatch.setattr(MqtLlavaTrainer, "_push_from_checkpoint", lambda self, folder: pushed.append(folder))
    train(load_recipe(TINY, [*words(tmp_path)[1:], "--push_to_hub", "--hub_model_id", "me/model"]))
    assert pushed[-1] == str(tmp_path)
    assert {str(tmp_path / "checkpoint-2"), str(tmp_path / "checkpoint-4")} <= set(pushed)


def test_the_curves_keep_the_last_value_of_a_step():
    entries = [{"step": 2, "eval_loss@4": 3.0}, {"step": 2, "eval_loss@4": 2.0}, {"step": 4, "eval_loss@16": 1.0}]
    assert budget_curves(entries) == {4: [(2, 2.0)], 16: [(4, 1.0)]}
