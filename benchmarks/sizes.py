"""How large the networks are that every system is given; it knows Python only."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Size:
    """How large the network is, and what goes with it.

    Args:
        width: Of its states.
        layers: How many blocks.
        heads: Of attention.
        vocabulary: Tokens, special ones included.
        inner: Width of a gated perceptron, as Qwen3 has it; 0 for a GPT-2.
        key_heads: Heads of keys and values, of a Qwen3.
        head_width: Of its heads.
        max_new_tokens: Where a response is cut off.
        prompt_tokens: Fewest and most tokens of a prompt.
        example_tokens: Of a response that is imitated.
        on_gpu: Whether all systems run on one, multiplying in bfloat16 with weights in single precision.
    """

    width: int
    layers: int
    heads: int
    vocabulary: int
    inner: int = 0
    key_heads: int = 0
    head_width: int = 0
    max_new_tokens: int = 64
    prompt_tokens: tuple[int, int] = (32, 64)
    example_tokens: tuple[int, int] = (32, 96)
    on_gpu: bool = False

    @property
    def attention_width(self) -> int:
        """Of what all heads of a block read."""
        return self.heads * self.head_width or self.width

    @property
    def block_parameters(self) -> int:
        """Weights of all blocks' matrices.

        Of a GPT-2: 4 of width x width for attention, twice 4 for the perceptron.
        """
        if not self.inner:
            return self.layers * 12 * self.width**2
        attention = 2 * self.attention_width + 2 * self.key_heads * self.head_width
        return self.layers * self.width * (attention + 3 * self.inner)

    @property
    def max_length(self) -> int:
        """No example is longer than this many tokens."""
        return 32 + self.prompt_tokens[1] + self.example_tokens[1]


SIZES = {
    "small": Size(256, 4, 4, 8192),
    "base": Size(512, 8, 8, 50257),
    "qwen3-0.6b": Size(1024, 28, 16, 151936, 3072, 8, 128, 256, (128, 256), (128, 384), on_gpu=True),
}
