"""Models from other people's towers and language models: built, upcycled, saved, loaded."""

import pytest
import torch
from conftest import IMAGE_SIZE, WORDS, picture, text_config, vision_config
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPConfig,
    CLIPModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from mqt_llava import MqtLlavaForConditionalGeneration
from mqt_llava.cli import main
from mqt_llava.conversion.components import upcycle


TOWERS = {
    "clip": vision_config(),
    "siglip2": vision_config(model_type="siglip_vision_model"),
    "dinov3": vision_config(model_type="dinov3_vit", num_register_tokens=4),
}
LANGUAGES = ["llama", "qwen3", "mistral", "smollm3"]


def plain_tokenizer(*more):
    """A language model's tokenizer, which has never heard of pictures."""
    vocab = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", *more, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def save_tower(folder, config):
    config = dict(config)
    AutoModel.from_config(AutoConfig.for_model(config.pop("model_type"), **config)).save_pretrained(folder)
    LlavaImageProcessorPil(image_mean=[0.3] * 3, image_std=[0.4] * 3).save_pretrained(folder)
    return folder


def save_language(folder, model_type, *more_tokens):
    config = text_config(model_type)
    tokenizer = plain_tokenizer(*more_tokens)
    config["vocab_size"] = len(tokenizer)
    config.pop("model_type")
    AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **config)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def question(processor, num_visual_tokens=4):
    content = [{"type": "image", "image": picture()}, {"type": "text", "text": "what is this"}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"num_visual_tokens": num_visual_tokens},
    )


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("language", LANGUAGES)
def test_any_tower_joins_any_language_model_for_good(tmp_path, tower, language):
    model, processor = MqtLlavaForConditionalGeneration.from_components(
        save_tower(tmp_path / "vision", TOWERS[tower]),
        save_language(tmp_path / "language", language),
        max_visual_tokens=16,
    )
    model.save_pretrained(tmp_path / "joined")
    processor.save_pretrained(tmp_path / "joined")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "joined")
    inputs = question(AutoProcessor.from_pretrained(tmp_path / "joined"))
    assert torch.equal(inputs["input_ids"], question(processor)["input_ids"])
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)
    output = again.generate(**inputs, num_visual_tokens=9, max_new_tokens=3)
    assert torch.equal(output, model.generate(**inputs, num_visual_tokens=9, max_new_tokens=3))


@pytest.mark.parametrize("tower, strategy", [("clip", "default"), ("siglip2", "full"), ("dinov3", "default")])
def test_strategy_is_full_only_for_towers_without_cls(tmp_path, tower, strategy):
    model, _ = MqtLlavaForConditionalGeneration.from_components(
        save_tower(tmp_path / "vision", TOWERS[tower]), save_language(tmp_path / "language", "llama"), 16
    )
    assert model.config.vision_feature_select_strategy == strategy
    patches = model.model.patch_features(torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE))
    assert patches.shape[1] == (IMAGE_SIZE // 4) ** 2


@pytest.fixture
def parts(tmp_path):
    return save_tower(tmp_path / "vision", TOWERS["clip"]), save_language(tmp_path / "language", "llama")


def test_components_keep_their_weights(parts):
    model, _ = MqtLlavaForConditionalGeneration.from_components(*parts, max_visual_tokens=16)
    language = AutoModelForCausalLM.from_pretrained(parts[1])
    rows = len(language.get_input_embeddings().weight)
    assert torch.equal(model.get_input_embeddings().weight[:rows], language.get_input_embeddings().weight)
    assert torch.equal(model.lm_head.weight[:rows], language.lm_head.weight)
    tower = AutoModel.from_pretrained(parts[0])
    ours = model.model.vision_tower.state_dict()
    assert ours and all(torch.equal(weight, tower.state_dict()[name]) for name, weight in ours.items())


def test_vocabulary_becomes_a_multiple_of_64(parts):
    model, processor = MqtLlavaForConditionalGeneration.from_components(*parts, max_visual_tokens=16)
    assert (
        len(model.get_input_embeddings().weight)
        == len(model.lm_head.weight)
        == model.config.text_config.vocab_size
        == 64
    )
    assert model.config.image_token_id == processor.image_token_id == len(processor.tokenizer) - 1


def test_whole_clip_lends_its_tower(tmp_path, parts):
    settings = vision_config()
    settings.pop("model_type")
    text = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "vocab_size": 50,
    }
    text |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    clip = CLIPModel(CLIPConfig(vision_config=settings, text_config=text, projection_dim=8))
    clip.save_pretrained(tmp_path / "clip")
    model, _ = MqtLlavaForConditionalGeneration.from_components(tmp_path / "clip", parts[1], max_visual_tokens=16)
    weight = clip.vision_model.encoder.layers[0].mlp.fc1.weight
    assert torch.equal(model.model.vision_tower.encoder.layers[0].mlp.fc1.weight, weight)


def test_pixels_are_normalised_as_the_tower_was_trained(parts):
    _, processor = MqtLlavaForConditionalGeneration.from_components(*parts, max_visual_tokens=16)
    assert list(processor.image_processor.image_mean) == [0.3] * 3
    assert processor.image_processor.crop_size["height"] == IMAGE_SIZE


def test_chatml_is_written_where_its_tokens_are_known(tmp_path, parts):
    language = save_language(tmp_path / "chatml", "qwen3", "<|im_start|>", "<|im_end|>")
    _, processor = MqtLlavaForConditionalGeneration.from_components(parts[0], language, max_visual_tokens=16)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what"}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert text == "<|im_start|>user\n<image>\nwhat<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("name", ["default", "plain"])
def test_templates_mark_answers(parts, name):
    _, processor = MqtLlavaForConditionalGeneration.from_components(*parts, max_visual_tokens=16)
    assert "{% generation %}" in processor.chat_template[name].replace("{%- generation -%}", "{% generation %}")


def test_other_fields_of_the_config_are_taken(parts):
    model, _ = MqtLlavaForConditionalGeneration.from_components(*parts, 16, query_init="local", vision_feature_layer=-1)
    assert model.config.query_init == "local"
    assert len(model.model.vision_tower.encoder.layers) == 3


def tiny_llava(folder):
    config = LlavaConfig(
        vision_config=vision_config(),
        text_config=text_config(vocab_size=64),
        image_token_index=30,
        vision_feature_layer=-2,
    )
    llava = LlavaForConditionalGeneration(config)
    llava.save_pretrained(folder)
    tokenizer = plain_tokenizer()
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    LlavaImageProcessorPil().save_pretrained(folder)
    return llava


def test_upcycled_model_is_ready_to_train(tmp_path, capsys):
    llava = tiny_llava(tmp_path / "llava")
    arguments = ["upcycle", str(tmp_path / "llava"), str(tmp_path / "out"), "--max-visual-tokens", "16"]
    assert main(arguments) == 0
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out").train()
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    inputs = question(processor)
    loss = model(**inputs, labels=inputs["input_ids"].masked_fill(inputs["input_ids"] == 30, -100)).loss
    loss.backward()
    assert model.model.query_transformer.query.grad.abs().sum() > 0
    assert torch.equal(model.lm_head.weight, llava.lm_head.weight)
    assert torch.equal(
        model.model.vision_tower.encoder.layers[0].mlp.fc1.weight,
        llava.model.vision_tower.encoder.layers[0].mlp.fc1.weight,
    )


def test_new_queries_start_from_the_projector(tmp_path):
    """A query reads near its own place, so its token is close to what the projector makes of the patches there."""
    llava = tiny_llava(tmp_path / "llava")
    with torch.no_grad():
        for parameter in llava.model.multi_modal_projector.parameters():
            parameter.normal_(std=0.3)
    llava.save_pretrained(tmp_path / "llava")
    upcycle(tmp_path / "llava", tmp_path / "out", max_visual_tokens=16)
    model = MqtLlavaForConditionalGeneration.from_pretrained(tmp_path / "out")
    features = torch.randn(1, 1, 32).expand(1, 36, 32)
    tokens = model.model.query_transformer(features)[0]
    wanted = llava.model.multi_modal_projector(torch.nn.functional.layer_norm(features, (32,)))[0, :16]
    alike = torch.nn.functional.cosine_similarity(tokens, wanted, dim=-1).mean()
    assert alike > 0.5


def test_upcycling_something_else_is_refused(parts, tmp_path, capsys):
    assert main(["upcycle", str(parts[1]), str(tmp_path / "out")]) == 2
    assert "must be a LLaVA" in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))
