"""A tokenizer for tasks whose texts are letters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def letter_tokenizer(letters: Sequence[str]) -> PreTrainedTokenizerFast:
    """Builds a tokenizer with one token for each letter, and `<eos>` and `<pad>`; text and tokens are one to one.

    Args:
        letters: In the order of their ids, which the two others follow.

    Returns:
        The tokenizer, which pads on the left.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate([*letters, "<eos>", "<pad>"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()  # letters are joined without spaces
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<eos>",
        pad_token="<pad>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
