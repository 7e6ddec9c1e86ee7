"""What a tokenizer and a model must agree on: the tokens that there are, and those that end and fill a row."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


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


def with_own_pad(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A tokenizer whose PAD is no EOS: transformers' classifiers would take that for PAD, and read texts before it.

    Args:
        tokenizer: Left as it is.

    Returns:
        The tokenizer itself where it has such a PAD; else a copy with one, new if its vocabulary has none.
    """
    if tokenizer.pad_token_id not in (None, tokenizer.eos_token_id):
        return tokenizer
    second = copy.deepcopy(tokenizer)
    vocabulary = tokenizer.get_vocab()
    pad = next((token for token in ("<pad>", "[PAD]", "<|pad|>") if token in vocabulary), "<|pad|>")
    second.add_special_tokens({"pad_token": pad})
    why = "has no PAD token" if tokenizer.pad_token_id is None else "fills rows with EOS, which ends texts"
    rank_zero_info(f"The tokenizer {why}: the reward model gets {pad!r}.")
    return second


def fit_embeddings(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tell: Callable[[str], None] = rank_zero_warn
) -> int:
    """Gives a model a row for every token; new ones start at the mean of the others.

    Args:
        model: Changed in place where it has fewer rows than the tokenizer has tokens.
        tokenizer: Its length counts added tokens.
        tell: How it is told.

    Returns:
        How many rows are new.
    """
    rows, tokens = model.get_input_embeddings().weight.shape[0], len(tokenizer)
    if tokens <= rows:
        return 0
    tell(f"The tokenizer has {tokens} tokens and the model {rows} rows: its embeddings were resized.")
    model.resize_token_embeddings(tokens, mean_resizing=False)
    with torch.no_grad():
        embeddings = (model.get_input_embeddings(), model.get_output_embeddings())
        for embedding in (embedding for embedding in embeddings if embedding is not None):
            embedding.weight[rows:] = embedding.weight[:rows].mean(0)
            bias = getattr(embedding, "bias", None)
            if bias is not None:
                bias[rows:] = bias[:rows].mean()
    return tokens - rows
