"""From what a user names to a network and its tokenizer."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from lightning_rlhf.models.adapter_configs import AdapterLike, has_adapter_only, plain_adapter
from lightning_rlhf.models.adapters import Adapters
from lightning_rlhf.models.quantization import QuantizationLike, copied, plain_quantization, quantization_config, steady

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    ModelSource: TypeAlias = PretrainedConfig | PreTrainedModel | str | os.PathLike[str]
else:
    ModelSource = Any


@dataclass
class ModelSpec:
    """A model and how to load it.

    Args:
        model: A hub name or folder, a config (random weights), or a model that is there already (which is copied, so
            that the one given stays as it is).
        dtype: Of the weights, such as ``"bfloat16"``; single precision by default, since what trains in less loses
            small updates. Lightning's ``precision`` flag acts on top of it.
        attn_implementation: As in transformers, such as ``"sdpa"`` or ``"eager"``; its choice by default.
        revision: Branch, tag or commit on the hub.
        trust_remote_code: Whether code that comes with the model may run.
        num_layers_unfrozen: How many of the top blocks train, with what comes after them (final norm, an untied head);
            embeddings, a tied head and the blocks below are then frozen. 0 trains nothing of the model (a value head
            still learns), -1 everything.
        adapter: What trains instead of the model's own weights: a config of PEFT (LoRA, DoRA, rsLoRA, AdaLoRA, IA3),
            its fields with ``peft_type`` or ``class_path``, or the folder or name of one that was trained before.
        quantization: How the weights, which are then frozen, are held: ``"nf4"``, ``"fp4"``, either with ``"-dq"`` for
            scales that are quantised too, ``"int8"``, or transformers' ``BitsAndBytesConfig`` or its fields.
        gguf_file: The file of the folder or hub name to read the weights from, which are unpacked to ``dtype``.
        gradient_checkpointing: Whether the activations of a block are computed again in the backward pass rather than
            held: less memory, a third more time, the same gradients.
    """

    model: ModelSource
    dtype: str = "float32"
    attn_implementation: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    num_layers_unfrozen: int = -1
    adapter: AdapterLike = None
    quantization: QuantizationLike = None
    gguf_file: str | None = None
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        for name in ("adapter", "quantization"):  # the command line has a form of its own for a class and its arguments
            value = getattr(self, name)
            setattr(self, name, value.as_dict() if hasattr(value, "as_dict") else value)
        if self.num_layers_unfrozen < -1:
            raise ValueError(
                f"`num_layers_unfrozen={self.num_layers_unfrozen}` must be a number of blocks, or -1 for everything."
            )
        if self.adapter is not None and self.num_layers_unfrozen != -1:
            raise ValueError(
                f"`num_layers_unfrozen={self.num_layers_unfrozen}` and `adapter` both say what trains: leave it out, "
                "and give a LoRA its `layers_to_transform` if only some blocks are to learn."
            )
        for name in ("quantization", "gguf_file"):
            if getattr(self, name) is not None and not self.is_named:
                raise ValueError(
                    f"`{name}={getattr(self, name)!r}` is a way of reading weights, and `model` is a "
                    f"{type(self.model).__name__}: write it to a folder by `save_pretrained`, and pass that."
                )
        if self.gguf_file is not None and self.quantization is not None:
            raise ValueError(
                f"`quantization={self.quantization!r}` does not go with `gguf_file={self.gguf_file!r}`, whose weights "
                "are unpacked: load it once, `save_pretrained`, and quantise that folder."
            )

    @classmethod
    def of(cls, model: ModelLike) -> ModelSpec:
        """A spec as it is, from its fields, or of a model that is all there is to say."""
        if isinstance(model, ModelSpec):
            return model
        return cls(**model) if isinstance(model, Mapping) else cls(model)

    @property
    def is_named(self) -> bool:
        """Whether a name or folder says where the weights come from, so that they can be had again."""
        return isinstance(self.model, str | os.PathLike)

    def plain(self) -> dict[str, Any] | None:
        """The fields as plain values, or None where the model is an object."""
        if not self.is_named:
            return None
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return values | {
            "model": os.fspath(self.model),
            "adapter": plain_adapter(self.adapter),
            "quantization": plain_quantization(self.quantization),
        }

    def has_model_of(self, other: ModelSpec) -> bool:
        """Whether the weights are the same as another's, whatever is to train and put beside them.

        Args:
            other: A spec.

        Returns:
            The answer; of objects that they are not.
        """
        mine, its = self.plain(), other.plain()
        if mine is None or its is None:
            return False
        differ = {"num_layers_unfrozen", "adapter", "gradient_checkpointing"}
        return all(mine[name] == its[name] for name in mine.keys() - differ)

    def adapt(self, model: PreTrainedModel) -> Adapters | None:
        """Puts the adapter, if there is one, into a model that was loaded.

        Args:
            model: Changed in place.

        Returns:
            The adapters, or None.
        """
        if self.adapter is None:
            return None
        if isinstance(self.adapter, str | os.PathLike):
            check_folder(os.fspath(self.adapter), "adapter")
        return Adapters(model, self.adapter)

    def load(self) -> PreTrainedModel:
        """Builds or reads the model, decoder-only or encoder-decoder as its config says.

        Returns:
            The model in evaluation mode, as transformers leaves it.

        Raises:
            ValueError: If the folder is missing, or the model has no head that writes.
            TypeError: If it is no model at all.
        """
        from transformers import PretrainedConfig, PreTrainedModel

        if isinstance(self.model, PreTrainedModel):
            model = copied(self.model, self.torch_dtype())
        elif isinstance(self.model, PretrainedConfig):
            model = self._from_config(copy.deepcopy(self.model))
        elif self.is_named:
            model = self._from_name(os.fspath(self.model))
        else:
            raise TypeError(
                f"`model={self.model!r}` must be a hub name, a folder, a transformers config or a PreTrainedModel."
            )
        if model.get_output_embeddings() is None:
            raise ValueError(
                f"`model={type(model).__name__}` has no language-modelling head: load it as ...ForCausalLM, or "
                "as ...ForConditionalGeneration where it has an encoder."
            )
        return model

    def _from_config(self, config: PretrainedConfig) -> PreTrainedModel:
        options = {} if self.attn_implementation is None else {"attn_implementation": self.attn_implementation}
        return (
            _auto_class(config)
            .from_config(config, dtype=self.torch_dtype(), trust_remote_code=self.trust_remote_code, **options)
            .eval()
        )

    def _from_name(self, name: str) -> PreTrainedModel:
        from transformers import AutoConfig, GgufConfig

        check_folder(name)
        if has_adapter_only(name):
            raise ValueError(
                f"`model={name!r}` holds an adapter and no model: pass `ModelSpec(<the model>, adapter={name!r})`."
            )
        source = self._source()
        config = AutoConfig.from_pretrained(name, **source)
        options: dict[str, Any] = {"dtype": self.torch_dtype(), **source}
        if self.attn_implementation is not None:
            options["attn_implementation"] = self.attn_implementation
        if self.quantization is not None:
            options["quantization_config"] = quantization_config(self.quantization, self.torch_dtype())
        if self.gguf_file is not None:  # unpacked, it trains and is saved as any other
            options["quantization_config"] = GgufConfig(dequantize=True)
        model = _auto_class(config).from_pretrained(name, config=config, **options)
        steady(model)
        return model

    def _source(self) -> dict[str, Any]:
        """Where and how transformers is to look for what lies under a name."""
        source = {"revision": self.revision or "main", "trust_remote_code": self.trust_remote_code}
        return source if self.gguf_file is None else {**source, "gguf_file": self.gguf_file}

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that lies beside the weights.

        Returns:
            The tokenizer.

        Raises:
            ValueError: If the model is an object or config, which has none.
        """
        from transformers import AutoTokenizer

        if not self.is_named:
            raise ValueError("`tokenizer=None` must be given where the model is a config or an object: pass one.")
        name = os.fspath(self.model)
        check_folder(name)
        return AutoTokenizer.from_pretrained(name, **self._source())

    def torch_dtype(self) -> torch.dtype:
        """``dtype`` as torch has it.

        Raises:
            ValueError: If it is no floating-point type.
        """
        dtype = getattr(torch, self.dtype.removeprefix("torch."), None)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise ValueError(f"`dtype={self.dtype!r}` must be a floating-point type such as 'float32' or 'bfloat16'.")
        return dtype


ModelLike: TypeAlias = ModelSpec | ModelSource
"""A name, folder, config, model or :class:`ModelSpec`; from YAML also a spec's fields."""


def check_folder(name: str, argument: str = "model") -> None:
    """What looks like a path must be one: the hub's own message would speak of a repository id.

    Args:
        name: A folder or hub name.
        argument: What the user calls it.

    Raises:
        ValueError: If there is no such folder.
    """
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1 or os.sep in name.replace("/", "", 1)
    if looks_local and not Path(name).is_dir():
        raise ValueError(f"`{argument}={name!r}` looks like a folder, and there is none: check the path.")


def _auto_class(config: PretrainedConfig) -> Any:
    """What loads such a model whole: the other class would make half a model of BART's encoder-decoder."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def check_frozen(spec: ModelSpec, argument: str) -> None:
    """Refuses of a model that never trains what says how it should.

    Args:
        spec: Of the model.
        argument: What the user calls it.

    Raises:
        ValueError: If something does.
    """
    if spec.num_layers_unfrozen != -1:
        raise ValueError(
            f"`{argument}.num_layers_unfrozen={spec.num_layers_unfrozen}` would be read by nothing: a {argument} is "
            "frozen whole. It is the policy's to set."
        )
    if spec.gradient_checkpointing:
        raise ValueError(
            f"`{argument}.gradient_checkpointing=True` would be read by nothing: a {argument} has no backward pass. It "
            "is the policy's to set."
        )
    if spec.adapter is not None and not isinstance(spec.adapter, str | os.PathLike):
        raise ValueError(
            f"`{argument}.adapter={spec.adapter!r}` is not trained, so that it would add nothing: pass the folder of "
            "one that is, or leave it out."
        )


def load_tokenizer(tokenizer: Any, spec: ModelSpec) -> PreTrainedTokenizerBase:
    """The tokenizer that was passed, or the one beside the model.

    Args:
        tokenizer: An object, a name or folder, or None.
        spec: The model.

    Returns:
        The tokenizer.
    """
    if tokenizer is None:
        return spec.load_tokenizer()
    if isinstance(tokenizer, str | os.PathLike):
        return ModelSpec(tokenizer, trust_remote_code=spec.trust_remote_code).load_tokenizer()
    return tokenizer
