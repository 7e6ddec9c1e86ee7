"""From what a user names to a network and its tokenizer."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    ModelSource: TypeAlias = str | os.PathLike[str] | PretrainedConfig | PreTrainedModel
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
    """

    model: ModelSource
    dtype: str = "float32"
    attn_implementation: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    num_layers_unfrozen: int = -1

    def __post_init__(self) -> None:
        if self.num_layers_unfrozen < -1:
            raise ValueError(
                f"`num_layers_unfrozen={self.num_layers_unfrozen}` must be a number of blocks, or -1 for everything."
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
        return {**asdict(self), "model": os.fspath(self.model)} if self.is_named else None

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
            model = copy.deepcopy(self.model).to(self._torch_dtype())
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
            .from_config(config, dtype=self._torch_dtype(), trust_remote_code=self.trust_remote_code, **options)
            .eval()
        )

    def _from_name(self, name: str) -> PreTrainedModel:
        from transformers import AutoConfig

        _check_folder(name)
        source = {"revision": self.revision or "main", "trust_remote_code": self.trust_remote_code}
        config = AutoConfig.from_pretrained(name, **source)
        options = {} if self.attn_implementation is None else {"attn_implementation": self.attn_implementation}
        dtype = self._torch_dtype()
        return _auto_class(config).from_pretrained(name, config=config, dtype=dtype, **source, **options)

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
        _check_folder(name)
        return AutoTokenizer.from_pretrained(
            name, revision=self.revision or "main", trust_remote_code=self.trust_remote_code
        )

    def _torch_dtype(self) -> torch.dtype:
        dtype = getattr(torch, self.dtype.removeprefix("torch."), None)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise ValueError(f"`dtype={self.dtype!r}` must be a floating-point type such as 'float32' or 'bfloat16'.")
        return dtype


ModelLike: TypeAlias = ModelSpec | ModelSource
"""A name, folder, config, model or :class:`ModelSpec`; from YAML also a spec's fields."""


def _check_folder(name: str) -> None:
    """What looks like a path must be one: the hub's own message would speak of a repository id."""
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1 or os.sep in name.replace("/", "", 1)
    if looks_local and not Path(name).is_dir():
        raise ValueError(f"`model={name!r}` looks like a folder, and there is none: check the path.")


def _auto_class(config: PretrainedConfig) -> Any:
    """What loads such a model whole: the other class would make half a model of BART's encoder-decoder."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


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


@dataclass(frozen=True)
class SpecialTokens:
    """The ids that end a response and fill a row.

    Attributes:
        eos: Every token that ends a response.
        pad: What fills rows up; masks come from lengths, so it may be one of ``eos``.
    """

    eos: tuple[int, ...]
    pad: int

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> SpecialTokens:
        """Reads them off the tokenizer and the model's generation config.

        Args:
            tokenizer: Its EOS and PAD.
            model: Its generation config may name further tokens that end a text.

        Returns:
            The ids.

        Raises:
            ValueError: If no token ends a response.
        """
        generation = getattr(model, "generation_config", None)
        more = getattr(generation, "eos_token_id", None)
        more = [] if more is None else [more] if isinstance(more, int) else list(more)
        rows = model.get_input_embeddings().weight.shape[0]
        own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        eos = tuple(dict.fromkeys(own + [token for token in more if 0 <= token < rows]))
        if not eos:
            raise ValueError(
                "`tokenizer` has no EOS token, so that no response could end: set `tokenizer.eos_token` to the token "
                "that ends a text."
            )
        pad = tokenizer.pad_token_id
        if pad is None:
            rank_zero_info("The tokenizer has no PAD token: rows are filled with EOS, which no loss counts.")
            pad = eos[0]
        return cls(eos, pad)


def fit_embeddings(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Gives a model a row for every token; new ones start at the mean of the others.

    Args:
        model: Changed in place where it has fewer rows than the tokenizer has tokens.
        tokenizer: Its length counts added tokens.
    """
    rows, tokens = model.get_input_embeddings().weight.shape[0], len(tokenizer)
    if tokens <= rows:
        return
    rank_zero_warn(f"The tokenizer has {tokens} tokens and the model {rows} rows: its embeddings were resized.")
    model.resize_token_embeddings(tokens, mean_resizing=False)
    with torch.no_grad():
        for embedding in (model.get_input_embeddings(), model.get_output_embeddings()):
            embedding.weight[rows:] = embedding.weight[:rows].mean(0)
            bias = getattr(embedding, "bias", None)
            if bias is not None:
                bias[rows:] = bias[:rows].mean()
