"""
MQT-LLaVA in Transformers: one model that answers with any number of visual tokens.

Importing this package makes its classes known to the Auto classes, and loads nothing heavy until one is used.
"""

import importlib

from ._auto import register
from ._version import __version__


_MODULE_OF = {
    "MqtLlavaConfig": "configuration_mqt_llava",
    "MODULES_NOT_TO_QUANTIZE": "modeling_mqt_llava",
    "MqtLlavaForConditionalGeneration": "modeling_mqt_llava",
    "MqtLlavaModel": "modeling_mqt_llava",
    "MqtLlavaPreTrainedModel": "modeling_mqt_llava",
    "MqtLlavaProcessor": "processing_mqt_llava",
}
__all__ = [*_MODULE_OF, "__version__"]


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)


register()
