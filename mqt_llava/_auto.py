"""
Makes the classes known to the Auto classes without importing them.

Transformers finds its own models by name: a table says that `mqt_llava` has a `MqtLlavaModel`, and the module
`transformers.models.mqt_llava` is imported when one is asked for. Here this package stands in for that module, and the
names go into the tables once they exist. The public `register` methods need the classes themselves, and with them torch
and the modeling code: over a second that a command line or a config reader would wait for nothing.
"""

import importlib.abc
import importlib.util
import sys


MODEL_TYPE = "mqt_llava"
AUTO_MAPPINGS = "transformers.models.auto.auto_mappings"
MODELING_AUTO = "transformers.models.auto.modeling_auto"
CLASS_NAMES = {
    AUTO_MAPPINGS: {
        "CONFIG_MAPPING_NAMES": "MqtLlavaConfig",
        "PROCESSOR_MAPPING_NAMES": "MqtLlavaProcessor",
    },
    MODELING_AUTO: {
        "MODEL_MAPPING_NAMES": "MqtLlavaModel",
        "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES": "MqtLlavaForConditionalGeneration",
        "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES": "MqtLlavaForConditionalGeneration",
    },
}


def register() -> None:
    """Registers with `AutoConfig`, `AutoProcessor`, `AutoModel`, `AutoModelForImageTextToText` and `-MultimodalLM`."""
    sys.modules.setdefault(f"transformers.models.{MODEL_TYPE}", sys.modules[__package__])
    if MODELING_AUTO in sys.modules:
        _register_classes()
    else:
        sys.meta_path.insert(0, _FillTablesOnImport())


def _register_classes() -> None:
    """The public way, for when the tables have already been read."""
    from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor

    from .configuration_mqt_llava import MqtLlavaConfig
    from .modeling_mqt_llava import MqtLlavaForConditionalGeneration, MqtLlavaModel
    from .processing_mqt_llava import MqtLlavaProcessor

    for module in CLASS_NAMES:  # the names too: pipelines and the server look models up by them
        _fill_tables(sys.modules[module])
    AutoConfig.register(MODEL_TYPE, MqtLlavaConfig, exist_ok=True)
    AutoProcessor.register(MqtLlavaConfig, MqtLlavaProcessor, exist_ok=True)
    AutoModel.register(MqtLlavaConfig, MqtLlavaModel, exist_ok=True)
    AutoModelForImageTextToText.register(MqtLlavaConfig, MqtLlavaForConditionalGeneration, exist_ok=True)
    AutoModelForMultimodalLM.register(MqtLlavaConfig, MqtLlavaForConditionalGeneration, exist_ok=True)


def _fill_tables(module) -> None:
    for table, class_name in CLASS_NAMES[module.__name__].items():
        getattr(module, table)[MODEL_TYPE] = class_name


class _FillTablesOnImport(importlib.abc.MetaPathFinder):
    """Puts the names into the tables as soon as the modules that hold them have been imported."""

    def __init__(self):
        self.waiting_for = {name for name in CLASS_NAMES if name not in sys.modules}
        for name in CLASS_NAMES.keys() - self.waiting_for:
            _fill_tables(sys.modules[name])

    def find_spec(self, fullname, path=None, target=None):
        """The ordinary spec of a module with tables, which are filled after it has run; nothing for other modules."""
        if fullname not in self.waiting_for:
            return None
        self.waiting_for.remove(fullname)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def run_then_fill(module):
            run(module)
            _fill_tables(module)

        spec.loader.exec_module = run_then_fill  # type: ignore[method-assign]
        return spec
