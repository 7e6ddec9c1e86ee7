"""A backbone with a scalar head, where transformers has no sequence classifier for an architecture."""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_rlhf.functional.logprobs import response_inputs

if TYPE_CHECKING:
    from transformers import PretrainedConfig
    from transformers.modeling_outputs import SequenceClassifierOutput

HEAD = "reward_head.safetensors"
"""Where the head lies in a folder, beside what ``AutoModel`` reads: one row, ``weight``, of (1, width)."""


class HeadedModel(nn.Module):
    """What ``AutoModel`` makes of a config, and one number read off its state at the last token.

    It is called as transformers' sequence classifiers are, with padding on the right. An encoder-decoder's decoder
    reads the same text as its encoder, one token later, as in transformers' classifiers of that kind.

    Args:
        config: Of the backbone.
        backbone: Made of the config if it is not there.
    """

    base_model_prefix = "backbone"

    def __init__(self, config: PretrainedConfig, backbone: Any = None) -> None:
        from transformers import AutoModel

        super().__init__()
        self.backbone = AutoModel.from_config(config) if backbone is None else backbone
        self.config = self.backbone.config
        weight = self.backbone.get_input_embeddings().weight
        width = self.config.get_text_config().hidden_size
        self.score = nn.Linear(width, 1, bias=False, dtype=weight.dtype, device=weight.device)
        self.accepted = frozenset(inspect.signature(self.backbone.forward).parameters)

    @property
    def base_model(self) -> Any:
        """The backbone."""
        return self.backbone

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SequenceClassifierOutput:
        """The score of every text.

        Args:
            input_ids: (batch, tokens), padded right.
            attention_mask: (batch, tokens), not 0 where a token is real.

        Returns:
            ``logits``, (batch, 1).
        """
        from transformers.modeling_outputs import SequenceClassifierOutput

        arguments = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
        if self.config.is_encoder_decoder:
            start = input_ids.new_full((len(input_ids), 1), self.config.decoder_start_token_id)
            arguments["decoder_input_ids"] = response_inputs(start, input_ids)
            arguments["decoder_attention_mask"] = attention_mask
        states = self.backbone(**{n: value for n, value in arguments.items() if n in self.accepted}).last_hidden_state
        last = (attention_mask != 0).sum(1) - 1
        logits = self.score(states)  # at every token, as transformers' classifiers do
        return SequenceClassifierOutput(logits=logits[torch.arange(len(last), device=last.device), last])

    # --- what transformers' models have too -----------------------------------------------------------------------

    def get_input_embeddings(self) -> nn.Module:
        """Of the backbone."""
        return self.backbone.get_input_embeddings()

    def get_output_embeddings(self) -> None:
        """There are none."""

    def resize_token_embeddings(self, tokens: int, **options: Any) -> None:
        """Gives the backbone so many rows."""
        self.backbone.resize_token_embeddings(tokens, **options)

    def gradient_checkpointing_enable(self, *args: Any) -> None:
        """Lets the backbone compute activations twice."""
        self.backbone.gradient_checkpointing_enable(*args)

    def disable_input_require_grads(self) -> None:
        """Takes off the backbone what goes with that."""
        self.backbone.disable_input_require_grads()

    def tie_weights(self) -> None:
        """Ties what the backbone ties."""
        self.backbone.tie_weights()

    # --- folders --------------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | os.PathLike[str], state_dict: Mapping[str, Tensor] | None = None) -> None:
        """Writes the backbone as ``AutoModel`` reads it, and the head beside it.

        Args:
            folder: Where to.
            state_dict: All weights, where they are sharded.
        """
        from safetensors.torch import save_file

        prefix = f"{self.base_model_prefix}."
        weights = self.state_dict() if state_dict is None else state_dict
        backbone = {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}
        self.backbone.save_pretrained(folder, state_dict=None if state_dict is None else backbone)
        head = weights["score.weight"].detach().cpu().clone().contiguous()
        save_file({"weight": head}, Path(folder) / HEAD, metadata={"format": "pt"})

    @classmethod
    def from_pretrained(cls, name: str, config: PretrainedConfig, has_head: bool, **options: Any) -> HeadedModel:
        """Reads a backbone, and its head where it has one.

        Args:
            name: A folder or hub name.
            config: Of the backbone.
            has_head: Whether a head lies beside it; a new one is drawn if not.
            **options: Of ``AutoModel.from_pretrained``.

        Returns:
            The model.
        """
        from safetensors.torch import load_file
        from transformers import AutoModel
        from transformers.utils import cached_file

        model = cls(config, AutoModel.from_pretrained(name, config=copy.deepcopy(config), **options))
        if has_head:
            found = cached_file(name, HEAD, revision=options.get("revision"))
            with torch.no_grad():
                model.score.weight.copy_(load_file(str(found))["weight"])
        return model.eval()
