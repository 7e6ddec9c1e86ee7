"""A task for encoder-decoders: put the letters of a word in order, having seen it done carelessly."""

from __future__ import annotations

from itertools import permutations
from string import ascii_lowercase
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_rlhf.examples.letters import letter_tokenizer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import BartConfig, PreTrainedTokenizerFast, T5Config

LETTERS = ascii_lowercase[:8]
LENGTHS = (3, 4, 5, 6)
SLIP = 0.75
DEMONSTRATIONS = 4000
SHAPES = ("t5", "bart")
HELD_OUT = 500


class Sorting:
    """Words of three to six different letters, a to h, and how a careless writer sorts 4,000 of them.

    The writer puts down the first of the letters that are left, in alphabetical order, one time in four, and else any
    other of them. Words that are held out, words that were sorted, and words to learn from are different ones.

    Args:
        seed: Draws who gets which words, and the slips.

    Attributes:
        held_out: Words for evaluation.
        demonstrations: Rows for imitation, a `prompt` and a `response` each.
        prompts: All other words.

    Example:
        >>> task = Sorting()
        >>> task.demonstrations[0], len(task.prompts)
        ({'prompt': 'abhgde', 'response': 'bahdge'}, 24396)
        >>> task.score(["hab", "hab", "hab"], ["abh", "bah", "abhh"])
        [1.0, 0.333..., 0.75]
    """

    def __init__(self, seed: int = 0) -> None:
        generator = np.random.default_rng(seed)
        words = ["".join(word) for length in LENGTHS for word in permutations(LETTERS, length)]
        words = [words[i] for i in generator.permutation(len(words))]
        self.held_out = words[:HELD_OUT]
        self.prompts = words[HELD_OUT + DEMONSTRATIONS :]
        self.demonstrations = [
            {"prompt": word, "response": sort_carelessly(word, generator)}
            for word in words[HELD_OUT : HELD_OUT + DEMONSTRATIONS]
        ]

    def score(self, prompts: Sequence[str], responses: Sequence[str], **metadata: Any) -> list[float]:
        """Scores what was written: the share of places in which it is the sorted word.

        Args:
            prompts: Words.
            responses: The same letters in order, if all is well.
            **metadata: Not used; a reward function is given more than the texts.

        Returns:
            A number from 0 to 1 each: places that agree, by the places of the longer of the two.
        """
        scores = []
        for prompt, response in zip(prompts, responses, strict=True):
            agree = sum(a == b for a, b in zip(sorted(prompt), response, strict=False))
            scores.append(agree / max(len(prompt), len(response)))
        return scores

    def demonstrated(self) -> float:
        """What the demonstrations score on average."""
        prompts, responses = zip(*((row["prompt"], row["response"]) for row in self.demonstrations), strict=True)
        return float(np.mean(self.score(prompts, responses)))

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Builds a tokenizer with one token for each letter, and `<eos>` and `<pad>`."""
        return letter_tokenizer(LETTERS)

    def config(self, shape: str) -> T5Config | BartConfig:
        """Describes an encoder-decoder of two blocks of width 64 on either side.

        Args:
            shape: ``"t5"`` (relative positions, no biases, its norm before a sublayer) or ``"bart"`` (learnt positions,
                biases, its norm after a sublayer).

        Returns:
            The config.

        Raises:
            ValueError: If the shape is another.
        """
        from transformers import BartConfig, T5Config

        eos, pad = len(LETTERS), len(LETTERS) + 1
        special = {"vocab_size": pad + 1, "eos_token_id": eos, "pad_token_id": pad}
        if shape == "t5":
            return T5Config(
                d_model=64,
                d_kv=16,
                d_ff=256,
                num_layers=2,
                num_heads=4,
                relative_attention_num_buckets=16,
                relative_attention_max_distance=16,
                dropout_rate=0.0,
                decoder_start_token_id=pad,
                **special,
            )
        if shape == "bart":
            halves = {f"{side}_layers": 2 for side in ("encoder", "decoder")}
            halves |= {f"{side}_attention_heads": 4 for side in ("encoder", "decoder")}
            halves |= {f"{side}_ffn_dim": 256 for side in ("encoder", "decoder")}
            return BartConfig(
                d_model=64,
                max_position_embeddings=16,
                init_std=0.125,  # for 64 numbers; the default is for a thousand
                dropout=0.0,
                bos_token_id=eos,
                decoder_start_token_id=eos,
                forced_eos_token_id=None,  # what is cut off did not end
                **halves,
                **special,
            )
        raise ValueError(f"`shape={shape!r}` must be 't5' or 'bart'.")


def sort_carelessly(word: str, generator: np.random.Generator) -> str:
    """Sorts letters, now and then putting down one before its turn.

    Args:
        word: The letters.
        generator: Where chance comes from.

    Returns:
        All of them.
    """
    left, written = sorted(word), ""
    while left:
        slips = len(left) > 1 and generator.random() < SLIP
        written += left.pop(int(generator.integers(1, len(left))) if slips else 0)
    return written
