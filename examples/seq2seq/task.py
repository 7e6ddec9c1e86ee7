"""The task: put the letters of a word in order. The letters are read by an encoder, and written by a decoder."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lightning_rlhf import ConversationDataModule, PromptDataModule

if TYPE_CHECKING:
    from transformers import BartConfig, PreTrainedTokenizerFast, T5Config

LETTERS = "abcdefghijklmnop"
LENGTHS = (4, 8)  # of a word, both ends counted
LEARNT, HELD_OUT = 4000, 200
EOS, PAD = len(LETTERS), len(LETTERS) + 1


def words(count: int, seed: int) -> list[str]:
    """Draws words.

    Args:
        count: How many.
        seed: The same seed gives the same words.

    Returns:
        Letters, any of which may come several times.

    Example:
        >>> words(3, seed=0)
        ['nbich', 'mpehijdg', 'ecl']
    """
    chance = random.Random(seed)
    return ["".join(chance.choices(LETTERS, k=chance.randint(*LENGTHS))) for _ in range(count)]


def ordered(word: str) -> str:
    """A word's letters in order."""
    return "".join(sorted(word))


def score(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """The reward: how many letters stand in their place, and 1 only if there is none too many.

    Args:
        prompts: The words.
        responses: What was made of them.

    Returns:
        A number from 0 to 1 each.

    Example:
        >>> score(["dacb"] * 3, ["abcd", "abdc", "abcdd"])
        [1.0, 0.5, 0.8]
    """
    scores = []
    for prompt, response in zip(prompts, responses, strict=True):
        right = sum(letter == other for letter, other in zip(ordered(prompt), response, strict=False))
        scores.append(right / max(len(prompt), len(response)))
    return scores


def measure(prompts: Sequence[str], responses: Sequence[str]) -> dict[str, list[float]]:
    """What validation reports beside the reward: which words are in order, all of them.

    Args:
        prompts: The words.
        responses: What was made of them.

    Returns:
        0 or 1 for each word, by name.
    """
    pairs = zip(prompts, responses, strict=True)
    return {"exact": [float(ordered(prompt) == response) for prompt, response in pairs]}


def tokenizer() -> PreTrainedTokenizerFast:
    """A token a letter, and `<eos>` and `<pad>`; it ends every text, as T5's and BART's do."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate([*LETTERS, "<eos>", "<pad>"])}
    made = Tokenizer(models.WordLevel(vocabulary))
    made.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    made.decoder = decoders.Fuse()
    made.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", EOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="<eos>", pad_token="<pad>", clean_up_tokenization_spaces=False
    )


def t5() -> T5Config:
    """A network of T5's shape, with gates as in its version 1.1."""
    from transformers import T5Config

    return T5Config(
        vocab_size=PAD + 1,
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        decoder_start_token_id=PAD,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )


def bart() -> BartConfig:
    """A network of BART's shape."""
    from transformers import BartConfig

    layers: dict[str, Any] = {}
    for half in ("encoder", "decoder"):
        layers |= {f"{half}_layers": 2, f"{half}_attention_heads": 4, f"{half}_ffn_dim": 128}
    return BartConfig(
        vocab_size=PAD + 1,
        d_model=64,
        max_position_embeddings=16,
        decoder_start_token_id=EOS,
        bos_token_id=EOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
        **layers,
    )


MODELS = {"t5": t5, "bart": bart}
"""By the names that the command line knows."""


class Pairs(ConversationDataModule):
    """Words and their letters in order, to imitate.

    Args:
        count: How many.
        batch_size: Of a batch.
    """

    def __init__(self, count: int = LEARNT, batch_size: int = 64) -> None:
        rows = [{"prompt": word, "response": ordered(word)} for word in words(count, seed=1)]
        super().__init__(rows, batch_size=batch_size)


class Words(PromptDataModule):
    """Words to put in order: others than those that were imitated, and again others to measure.

    Args:
        iterations: How often words are put in order and learnt from.
        prompts: Words of an iteration.
    """

    def __init__(self, iterations: int = 40, prompts: int = 128) -> None:
        held_out = words(HELD_OUT, seed=3)
        super().__init__(
            words(iterations * prompts, seed=2),
            validation=held_out,
            test=held_out,
            predict=held_out,
            batch_size=prompts,
        )
