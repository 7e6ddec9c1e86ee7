"""Models from GGUF files, as plain ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def unpacked(auto: Any, name: str, options: dict[str, Any]) -> PreTrainedModel:
    """Reads a GGUF file, and leaves nothing of it in the model.

    Args:
        auto: The class of transformers that reads it.
        name: Of the folder, or on the hub.
        options: For ``from_pretrained``, ``gguf_file`` among them.

    Returns:
        A model whose weights are of the dtype that was asked for, and which can be trained and saved.
    """
    import transformers

    kind = getattr(transformers, "GgufConfig", None)
    if kind is not None:  # which may leave weights packed where it has the kernels
        options = {**options, "quantization_config": kind(dequantize=True)}
    model = auto.from_pretrained(name, **options)
    model.hf_quantizer, model.is_quantized = None, False
    model.config.__dict__.pop("quantization_config", None)
    return model
