"""From what a user names to a network that scores."""

from __future__ import annotations

import copy
import os
import tempfile
from typing import Any

from lightning_rlhf.models.adapter_configs import has_adapter_only
from lightning_rlhf.models.headed import HeadedModel
from lightning_rlhf.models.loading import ModelSpec, check_folder
from lightning_rlhf.models.quantization import copied, quantization_config, steady

STORED = "reward"
"""Where a config keeps how a reward model is to be read: ``mean`` and ``std`` of its scores, how it ``reads`` texts,
and whether its ``head`` lies beside its backbone."""


def load_scorer(spec: ModelSpec) -> Any:
    """Builds or reads a network with one output: transformers' sequence classifier, or a head on a backbone.

    Args:
        spec: Of a language model, whose head is not read, an encoder, or a reward model that is to learn on.

    Returns:
        The network in evaluation mode.

    Raises:
        ValueError: If the folder is missing, or is a classifier's that has other labels.
        TypeError: If it is no model at all.
    """
    from transformers import PretrainedConfig, PreTrainedModel

    if spec.gguf_file is not None:
        raise ValueError(
            f"`gguf_file={spec.gguf_file!r}` holds a language model: load it once as one, `save_pretrained`, and pass "
            "that folder."
        )
    if isinstance(spec.model, PretrainedConfig):
        return _from_config(copy.deepcopy(spec.model), spec)
    if isinstance(spec.model, HeadedModel) or (isinstance(spec.model, PreTrainedModel) and _is_scorer(spec.model)):
        return copied(spec.model, spec.torch_dtype())
    if isinstance(spec.model, PreTrainedModel):
        # transformers knows which weights of one class are those of another, once they lie in a folder.
        with tempfile.TemporaryDirectory() as folder:
            spec.model.save_pretrained(folder)
            return _from_name(folder, spec)
    if not spec.is_named:
        raise TypeError(
            f"`model={spec.model!r}` must be a hub name, a folder, a transformers config or a PreTrainedModel."
        )
    name = os.fspath(spec.model)
    check_folder(name)
    if has_adapter_only(name):
        raise ValueError(
            f"`model={name!r}` holds an adapter and no model: pass `ModelSpec(<the model>, adapter={name!r})`."
        )
    return _from_name(name, spec)


def stored(config: Any) -> dict[str, Any]:
    """How a reward model is to be read.

    Args:
        config: Of a model.

    Returns:
        What its export says; nothing for other classifiers.
    """
    return getattr(config, STORED, None) or {}


def has_classifier(config: Any) -> bool:
    """Whether transformers has a sequence classifier for an architecture.

    Args:
        config: Of a model.

    Returns:
        The answer.
    """
    from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

    return type(config) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING


def _is_scorer(model: Any) -> bool:
    return "ForSequenceClassification" in type(model).__name__ and model.config.num_labels == 1


def _options(spec: ModelSpec) -> dict[str, Any]:
    options = {"dtype": spec.torch_dtype(), "trust_remote_code": spec.trust_remote_code}
    return options if spec.attn_implementation is None else {**options, "attn_implementation": spec.attn_implementation}


def _from_config(config: Any, spec: ModelSpec) -> Any:
    from transformers import AutoModel, AutoModelForSequenceClassification

    config.num_labels = 1
    if has_classifier(config):
        return AutoModelForSequenceClassification.from_config(config, **_options(spec)).eval()
    return HeadedModel(config, AutoModel.from_config(config, **_options(spec))).eval()


def _from_name(name: str, spec: ModelSpec) -> Any:
    from transformers import AutoConfig, AutoModelForSequenceClassification

    source = {"revision": spec.revision or "main", "trust_remote_code": spec.trust_remote_code}
    config = AutoConfig.from_pretrained(name, **source)
    was_trained = any("ForSequenceClassification" in found for found in config.architectures or ())
    if was_trained and config.num_labels != 1:
        shown = name if spec.is_named else type(spec.model).__name__  # which lies in a folder that is about to go
        raise ValueError(
            f"`model={shown!r}` is a classifier of {config.num_labels} labels, and a reward model has one output: pass "
            "the model that it was made from."
        )
    config.num_labels = 1
    options = {**_options(spec), **source}
    if spec.quantization is not None:
        options["quantization_config"] = quantization_config(spec.quantization, spec.torch_dtype())
    if has_classifier(config):
        if spec.quantization is not None and not options["quantization_config"].llm_int8_skip_modules:
            options["quantization_config"].llm_int8_skip_modules = _heads(config)
        model = AutoModelForSequenceClassification.from_pretrained(name, config=config, **options)
    else:
        model = HeadedModel.from_pretrained(name, config, bool(stored(config).get("head")), **options)
    steady(model)
    return model


def _heads(config: Any) -> list[str]:
    """Names of what a classifier has beside its backbone, which learns and so is not quantised."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForSequenceClassification

    with init_empty_weights():
        model = AutoModelForSequenceClassification.from_config(config)
    return [name for name, _ in model.named_children() if name != model.base_model_prefix]
