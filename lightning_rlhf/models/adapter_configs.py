"""What an adapter may be given as: a config of PEFT, its fields, or a folder."""

from __future__ import annotations

import copy
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from lightning_rlhf.dotted import imported

if TYPE_CHECKING:
    from peft import PeftConfig

    AdapterLike: TypeAlias = PeftConfig | Mapping[str, Any] | str | os.PathLike[str] | None
else:
    AdapterLike = Any

_UPSTREAM = (
    "fan_in_fan_out is set to False but the target module is `Conv1D`",  # which PEFT then mends by itself
    "`is_gradient_checkpointing` is deprecated",  # between PEFT and transformers
)
"""Warnings of PEFT that say nothing to whoever trains."""


def adapter_config(adapter: AdapterLike, has_encoder: bool = False) -> PeftConfig:
    """What PEFT makes an adapter of.

    Args:
        adapter: A config, its fields (with ``peft_type``, or ``class_path`` and ``init_args``), or the folder or name
            of an adapter.
        has_encoder: Whether it is for an encoder-decoder, by which PEFT knows how to load it again.

    Returns:
        A config of its own.

    Raises:
        TypeError: If it is none of these.
        ValueError: If there is no such type, or responses could not be written with it.
    """
    from peft import PeftConfig

    if isinstance(adapter, str | os.PathLike):
        config = PeftConfig.from_pretrained(os.fspath(adapter))
    elif isinstance(adapter, Mapping):
        config = _from_fields(dict(adapter))
    elif isinstance(adapter, PeftConfig):
        config = copy.deepcopy(adapter)
    else:
        raise TypeError(
            f"`adapter={adapter!r}` must be a config of PEFT such as `LoraConfig()`, its fields, or the folder of an "
            "adapter."
        )
    if config.is_prompt_learning or config.is_adaption_prompt:
        raise ValueError(
            f"`adapter` of type {config.peft_type.value} puts tokens before the prompt, with which decoding from a "
            "cache differs from reading the whole text: use one that changes layers, such as LORA."
        )
    if config.peft_type.value in ("XLORA", "POLY"):
        raise ValueError(
            f"`adapter` of type {config.peft_type.value} is mixed anew for every text, which only PEFT's own forward "
            "does: use one that is the same for all, such as LORA."
        )
    if getattr(config, "alora_invocation_tokens", None) is not None:
        raise ValueError(
            "`adapter.alora_invocation_tokens` switches the adapter on in the middle of a text, which only PEFT's own "
            "forward does: leave it out."
        )
    config.task_type = config.task_type or ("SEQ_2_SEQ_LM" if has_encoder else "CAUSAL_LM")
    return config


def _from_fields(fields: dict[str, Any]) -> PeftConfig:
    from peft import PeftConfig, PeftType

    if "class_path" in fields:
        arguments = dict(fields.get("init_args", {}))
        # The command line fills in what PEFT keeps for itself, and what it warns of where nothing reads it.
        arguments.pop("runtime_config", None)
        if arguments.get("init_lora_weights") != "loftq":
            arguments.pop("loftq_config", None)
        return imported(fields["class_path"], "adapter.class_path")(**arguments)
    kind = str(fields.pop("peft_type", "")).upper()
    if kind not in PeftType.__members__:
        raise ValueError(
            f"`adapter.peft_type={kind!r}` must be one of PEFT's, such as 'LORA', 'ADALORA' or 'IA3'; or write "
            "`class_path: peft.LoraConfig` and `init_args`."
        )
    return PeftConfig.from_peft_type(peft_type=kind, **fields)


def plain_adapter(adapter: AdapterLike) -> str | dict[str, Any] | None:
    """The same as plain values, for checkpoints.

    Args:
        adapter: In any of its forms.

    Returns:
        A folder or name, or fields.
    """
    if adapter is None:
        return None
    if isinstance(adapter, str | os.PathLike):
        return os.fspath(adapter)
    fields = adapter if isinstance(adapter, Mapping) else adapter.to_dict()
    return json.loads(json.dumps(dict(fields), default=lambda value: getattr(value, "value", None) or sorted(value)))


def begun_at_nothing(config: PeftConfig, inference_mode: bool = False) -> PeftConfig:
    """The config of an adapter that is about to be loaded: PiSSA and its like would change the model at once.

    Args:
        config: Of an adapter that exists.
        inference_mode: Whether it is not to train.

    Returns:
        A copy.
    """
    config = copy.deepcopy(config)
    config.inference_mode = inference_mode
    for name in ("init_lora_weights", "init_weights"):
        if hasattr(config, name):
            setattr(config, name, True)
    if config.peft_type == "ADALORA":
        config.rank_pattern = None  # its ranks are 0, not gone
    return config


def changes_model(config: PeftConfig) -> bool:
    """Whether beginning an adapter takes something off the weights that it adapts, as PiSSA does.

    Args:
        config: Of the adapter.

    Returns:
        The answer.
    """
    begins = getattr(config, "init_lora_weights", True)
    return not (isinstance(begins, bool) or begins in ("gaussian", "eva", "orthogonal"))


def has_adapter_only(folder: str) -> bool:
    """Whether a folder holds an adapter and no model.

    Args:
        folder: That may or may not be there.

    Returns:
        The answer.
    """
    return (Path(folder) / "adapter_config.json").is_file() and not (Path(folder) / "config.json").is_file()


@contextmanager
def reading(adapter: Any, argument: str = "adapter") -> Iterator[None]:
    """Leaves out what PEFT says to itself, and makes an error of weights that are missing.

    Args:
        adapter: What is read, for the error.
        argument: What the user calls it.
    """
    with warnings.catch_warnings():
        for message in _UPSTREAM:
            warnings.filterwarnings("ignore", message=message)
        warnings.filterwarnings("error", message="Found missing adapter keys")
        try:
            yield
        except (UserWarning, RuntimeError) as error:
            if "missing adapter keys" not in str(error) and "size mismatch" not in str(error):
                raise
            raise ValueError(
                f"`{argument}={str(adapter)!r}` is not of this model: {str(error).strip()[:300]}"
            ) from error
