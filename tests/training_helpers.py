"""Tiny models, pictures and data sets for the tests of training, built in code."""

import json

import numpy as np
import torch
from PIL import Image

from mqt_llava import MqtLlavaConfig, MqtLlavaForConditionalGeneration
from mqt_llava.training.arguments import MqtLlavaTrainingArguments
from mqt_llava.training.conversations import ConversationCollator
from mqt_llava.training.tiny import tiny_processor
from mqt_llava.training.trainer import MqtLlavaTrainer


SIZE, M = 24, 16


def tiny_model(seed=0, **changes):
    torch.manual_seed(seed)
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": SIZE,
        "patch_size": 4,
    }
    text = {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": len(tiny_processor().tokenizer),
        "max_position_embeddings": 1024,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config = MqtLlavaConfig(
        vision_config=vision,
        text_config={**text, **changes},
        image_token_index=4,
        max_visual_tokens=M,
        query_num_attention_heads=4,
    )
    return MqtLlavaForConditionalGeneration(config)


def picture(seed=0, size=(SIZE, SIZE)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def conversation(seed=0, images=1, answer=None):
    """A system message keeps the prompt short; questions differ in length."""
    question = [{"type": "text", "text": "What" + "?" * (seed % 5)}]
    return {
        "messages": [
            {"role": "system", "content": [{"type": "text", "text": "S"}]},
            {"role": "user", "content": [{"type": "image"}] * images + question},
            {"role": "assistant", "content": [{"type": "text", "text": answer or f"It is {seed}."}]},
        ],
        "images": [picture(seed + i) for i in range(images)],
    }


def conversations(number=8, **kwargs):
    return [conversation(seed, **kwargs) for seed in range(number)]


def write_llava(folder, number=12, text_only=()):
    """A folder of images and a LLaVA JSON."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    records = []
    for seed in range(number):
        turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": f"It is {seed}."}]
        record = {"id": seed, "image": f"{seed}.png", "conversations": turns}
        if seed in text_only:
            turns[0]["value"] = "What?"
            del record["image"]
        else:
            picture(seed).save(folder / "images" / f"{seed}.png")
        records.append(record)
    (folder / "data.json").write_text(json.dumps(records))
    return folder / "data.json", folder / "images"


def arguments(folder, **changes):
    defaults = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 3,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 7,
    }
    return MqtLlavaTrainingArguments(**{**defaults, **changes})


def trainer(folder, model=None, examples=None, **changes):
    """`folder`, or the arguments themselves."""
    processor = tiny_processor()
    examples = conversations() if examples is None else examples
    return MqtLlavaTrainer(
        tiny_model() if model is None else model,
        folder if isinstance(folder, MqtLlavaTrainingArguments) else arguments(folder, **changes),
        train_dataset=examples,
        eval_dataset=[examples[i] for i in range(5)],
        data_collator=ConversationCollator(processor),
        processing_class=processor,
    )


def logged(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]
