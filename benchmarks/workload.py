"""The work that every system is given: networks of some sizes with random weights, prompts, texts and a toy reward.

It knows torch and transformers only, since it runs in every system's own environment.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from benchmarks import texts
from benchmarks.sizes import SIZES, Size
from benchmarks.texts import WORDS

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

PAD, EOS, UNK = 0, 1, 2
BATCH = 32
"""Responses of an online iteration; examples of an offline step."""

LONG = {"sft_8k": (2, 8192), "grpo_16k": (4, 16384)}
"""Rows of the table whose texts are long: how many of them there are, and how many tokens each has."""

MEAN_LENGTH = 24
"""One in so many tokens is EOS where lengths are ragged."""

PACKED_ROWS = 16
"""Rows of ``max_length`` tokens that a packed step has room for."""

LEARNING_RATE = 1e-6
KL_COEF = 0.05
GROUP_SIZE = 8

Lengths = Literal["ragged", "full"]


@dataclass(frozen=True)
class Case:
    """One row of the table, as every system is told it.

    Args:
        row: What is done: ``"ppo"``, ``"grpo"``, ``"grpo_mu"``, ``"sft"``, ``"sft_packed"``, ``"reward"``,
            ``"generate"``, or a key of :data:`LONG`.
        size: A key of :data:`SIZES`.
        lengths: Of responses.
        folder: With the network and the tokenizer to begin from.
        threads: Of torch.
        iterations: For so many there must be data, the one of warm-up included.
        num_layers_unfrozen: What trains, for systems that can freeze layers.
        batch: Responses of an online iteration.
        micro_batch_size: Where it is not 0, an epoch of this library is one optimizer step on the whole batch, of so
            many responses at a time.
        micro_batch_tokens: Likewise, of so many tokens at a time.
        compiles: Whether this library compiles the passes that train.
    """

    row: str
    size: str
    lengths: Lengths
    folder: str
    threads: int
    iterations: int
    num_layers_unfrozen: int = -1
    batch: int = BATCH
    micro_batch_size: int = 0
    micro_batch_tokens: int = 0
    compiles: bool = False

    @property
    def network(self) -> Size:
        """The size itself."""
        return SIZES[self.size]

    @property
    def group_size(self) -> int:
        """Responses to a prompt."""
        if self.row in LONG:
            return LONG[self.row][0] if self.row.startswith("grpo") else 1
        return GROUP_SIZE if self.row.startswith("grpo") else 1

    @property
    def rows(self) -> int:
        """Responses of an iteration, or examples of a step."""
        return LONG[self.row][0] if self.row in LONG else self.batch

    @property
    def max_new_tokens(self) -> int:
        """Where a response is cut off."""
        return LONG[self.row][1] - self.network.prompt_tokens[1] if self.row in LONG else self.network.max_new_tokens

    @property
    def max_length(self) -> int:
        """No example is longer than this many tokens."""
        return LONG[self.row][1] if self.row in LONG else self.network.max_length

    @property
    def epochs(self) -> int:
        """How often an iteration learns from a response."""
        return 4 if self.row in ("ppo", "grpo_mu") else 1

    @property
    def minibatch_size(self) -> int:
        """Responses of an optimizer step."""
        in_pieces = self.micro_batch_size or self.micro_batch_tokens
        return 8 if self.row in ("ppo", "grpo_mu") and not in_pieces else self.rows

    def prompts(self) -> list[str]:
        """Prompts of all iterations."""
        return texts.prompts(self.network, self.iterations * self.rows // self.group_size)

    def examples(self) -> list[dict[str, str]]:
        """Examples of all steps."""
        return texts.examples(self.network, self.iterations * self.rows, length=LONG.get(self.row, (0, 0))[1])

    def pairs(self) -> list[dict[str, str]]:
        """Comparisons of all steps."""
        return texts.pairs(self.network, self.iterations * BATCH)


def config(size: Size) -> PretrainedConfig:
    """A GPT-2 without dropout, 512 positions, the head tied to the embedding; or a Qwen3.

    Args:
        size: Of the network.

    Returns:
        Its config.
    """
    from transformers import GPT2Config, Qwen3Config

    if size.inner:
        qwen = Qwen3Config(
            vocab_size=size.vocabulary,
            hidden_size=size.width,
            intermediate_size=size.inner,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            num_key_value_heads=size.key_heads,
            head_dim=size.head_width,
            max_position_embeddings=40960,
            tie_word_embeddings=True,
        )
        qwen.bos_token_id = qwen.eos_token_id = EOS
        qwen.pad_token_id = PAD
        return qwen
    return GPT2Config(
        vocab_size=size.vocabulary,
        n_embd=size.width,
        n_layer=size.layers,
        n_head=size.heads,
        n_positions=512,
        attn_pdrop=0.0,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
        bos_token_id=EOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )


def network(size: Size, lengths: Lengths, seed: int = 0) -> PreTrainedModel:
    """Random weights, and an EOS that does not depend on the text.

    One coordinate behind the last norm is a constant 8, which the head's row of EOS reads, and nothing else reads or
    writes: EOS has one probability in all contexts, 1/24 where lengths are ragged and none where they are full. A
    Qwen3's EOS is a token like the others, of which there are so many that it hardly ever comes.

    Args:
        size: Of the network.
        lengths: Whether responses end by EOS or are all cut off.
        seed: Of the weights.

    Returns:
        The network.

    Raises:
        ValueError: If a Qwen3 is to end.
    """
    from transformers import GPT2LMHeadModel, Qwen3ForCausalLM

    if size.inner:
        if lengths == "ragged":
            raise ValueError("`lengths='ragged'` is for GPT-2's sizes: a Qwen3 has no EOS of known probability.")
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return Qwen3ForCausalLM(config(size)).eval()
    constant = 8.0
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        model = GPT2LMHeadModel(config(size)).eval()
        norm, rows = model.transformer.ln_f, model.lm_head.weight
        norm.weight[-1] = 0.0
        norm.bias[-1] = constant
        rows[:, -1] = 0.0
        rows[EOS] = 0.0
        # The other logits are normal around 0: a state of length sqrt(width - 1) times rows of known spread.
        spread = model.config.initializer_range * math.sqrt(size.width - 1)
        others = math.log(size.vocabulary) + spread**2 / 2  # of their masses' sum
        rows[EOS, -1] = (others - math.log(MEAN_LENGTH - 1) if lengths == "ragged" else -40.0) / constant
    return model


def tokenizer(size: Size) -> PreTrainedTokenizerFast:
    """Words ``w3 w4 ...`` between spaces, one a token, padded left.

    Args:
        size: Of the network.

    Returns:
        The tokenizer.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    words = [*special.values(), *(f"w{i}" for i in range(WORDS, size.vocabulary))]
    tokens = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokens, padding_side="left", clean_up_tokenization_spaces=False, **special
    )


def save(folder: Path, size: Size, lengths: Lengths, seed: int = 0) -> None:
    """Writes network and tokenizer, for all systems to begin from.

    Args:
        folder: To write to.
        size: Of the network.
        lengths: Whether responses end by EOS or are all cut off.
        seed: Of the weights.
    """
    from transformers import logging

    logging.disable_progress_bar()
    network(size, lengths, seed).save_pretrained(folder)
    tokenizer(size).save_pretrained(folder)


def reward(responses: Sequence[Sequence[int]], size: Size) -> list[float]:
    """Scores each response by the share of its tokens in the lower half of the vocabulary.

    Args:
        responses: Token ids.
        size: Of the network.

    Returns:
        A number from 0 to 1 each.
    """
    return [sum(token < size.vocabulary // 2 for token in row) / max(len(row), 1) for row in responses]


def length_of(response: Any) -> int:
    """How many tokens of a response count: those up to its first EOS, with it.

    Args:
        response: Token ids, whatever follows the EOS.

    Returns:
        The length.
    """
    ids = [int(token) for token in response]
    return ids.index(EOS) + 1 if EOS in ids else len(ids)
