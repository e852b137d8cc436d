"""PEFT adapters of this project's models, merged into what they were trained on."""

from pathlib import Path

from peft import PeftConfig, PeftModel

from ..modeling_mqt_llava import MqtLlavaForConditionalGeneration
from ..processing_mqt_llava import MqtLlavaProcessor
from .convert import folder_in_the_making


def merge(adapter: str | Path, destination: str | Path, *, base_model: str | Path | None = None) -> Path:
    """
    Writes the model that a PEFT adapter makes of its base. A query transformer saved with the adapter replaces the
    base's.

    Args:
        adapter: folder or Hub id.
        destination: folder to write, which must not hold anything yet.
        base_model (*optional*): folder or Hub id. Defaults to what the adapter names.

    Raises:
        ValueError: if there is no base, it does not fit, or `destination` is not empty.
    """
    base = base_model or PeftConfig.from_pretrained(str(adapter)).base_model_name_or_path
    if not base:
        raise ValueError("`base_model` must be given: the adapter does not name the model that it was trained on.")
    with folder_in_the_making(destination) as folder:
        model = MqtLlavaForConditionalGeneration.from_pretrained(base)
        merged = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
        merged.save_pretrained(folder)
        # Training saves the processor that it used beside its adapter; others save the adapter alone.
        with_processor = adapter if (Path(adapter) / "processor_config.json").is_file() else base
        MqtLlavaProcessor.from_pretrained(with_processor).save_pretrained(folder)
    return Path(destination)
