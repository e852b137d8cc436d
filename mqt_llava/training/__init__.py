"""How the numbers are found: from conversations about images to batches for the Trainer."""

import importlib


_MODULE_OF = {
    "ConversationCollator": "conversations",
    "ConversationDataset": "data",
    "ConversationEncoder": "conversations",
    "Draw": "draws",
    "ElasticTrainerMixin": "elastic",
    "MqtLlavaTrainer": "trainer",
    "MqtLlavaTrainingArguments": "arguments",
    "Recipe": "recipe",
    "load_recipe": "recipe",
    "parse_draw": "draws",
    "train": "run",
}
__all__ = sorted(_MODULE_OF)


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
