"""Models whose prompt an encoder reads once, and whose decoder writes the response."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lightning_rlhf.batches import ResponseBatch
from lightning_rlhf.models.attention import attention_kernels
from lightning_rlhf.models.blocks import find_blocks
from lightning_rlhf.models.decoder import Decoder
from lightning_rlhf.models.encoded import Encoded
from lightning_rlhf.models.outputs import DecoderOutput, same_logits
from lightning_rlhf.models.reading import Reading, Responses, aligned, padded, source_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TRIED = 3
"""Of a few tokens to try things on, so many are the prompt too."""


def decoder_of(model: PreTrainedModel) -> Decoder:
    """One way to call a model, whatever it is.

    Args:
        model: Any ``...ForCausalLM``, or what ``AutoModelForSeq2SeqLM`` loads.

    Returns:
        A decoder, with an encoder or without.
    """
    return EncoderDecoder(model) if model.config.is_encoder_decoder else Decoder(model)


class EncoderDecoder(Decoder):
    """An encoder-decoder, called as if prompt and response were one text.

    The encoder reads prompts padded on the right, where it is used to padding: some number positions from the left
    edge. A response begins behind the decoder's start token and, where the generation config forces one, the BOS token;
    both are given to the decoder and are no part of the response, so that no loss counts them. Response token ``t`` is
    predicted at decoder position ``len(prefix) - 1 + t``. :meth:`forward` without a cache is for trying things out.

    Args:
        model: What ``AutoModelForSeq2SeqLM`` loads.

    Attributes:
        prefix: What the decoder reads before the response.

    Raises:
        ValueError: If nothing says what a response begins with, or something says several things.
    """

    has_encoder = True

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self.caches = {"past_key_values", "use_cache", "encoder_outputs"} <= self.accepted
        start = _token(model, "decoder_start_token_id")
        if start is None:
            raise ValueError(
                f"`policy={type(model).__name__}` has no start token, behind which a response would begin: set "
                "`decoder_start_token_id` in the model's generation config (T5 begins with PAD, BART with EOS, mBART "
                "with a language)."
            )
        forced = _token(model, "forced_bos_token_id")
        self.prefix = (start,) if forced is None else (start, forced)

    @property
    def max_positions(self) -> int | None:
        """How many tokens the decoder reads, the prefix among them; None if the config names no limit."""
        return _positions(self.model.get_decoder(), "decoder")

    def prompt_room(self, max_new_tokens: int) -> int | None:
        """How many tokens the encoder reads; None for no limit.

        Args:
            max_new_tokens: What the response may need, of the decoder.

        Returns:
            The number.

        Raises:
            ValueError: If the decoder has not as many positions.
        """
        room = self.response_room
        if room is not None and max_new_tokens > room:
            raise ValueError(
                f"`max_new_tokens={max_new_tokens}` is more than the {room} tokens that the policy's decoder can "
                "write: lower it."
            )
        return _positions(self.model.get_encoder(), "encoder")

    @property
    def response_room(self) -> int | None:
        """How many tokens the decoder can write; None for no limit."""
        return None if self.max_positions is None else self.max_positions - len(self.prefix)

    def find_blocks(self) -> None:
        """Finds the blocks of both halves."""
        self.blocks, encoder = (
            find_blocks(self.model, _layers(half, side), lambda: self(*self.sample(), keep=1), _name(self.model, half))
            for side, half in (("decoder", self.model.get_decoder()), ("encoder", self.model.get_encoder()))
        )
        self.encoder_blocks = () if encoder is None else encoder.blocks

    def begin(
        self, prompt_tokens: Int[Tensor, "batch prompt"], prompt_mask: Bool[Tensor, "batch prompt"]
    ) -> tuple[Int[Tensor, "batch begun"], Bool[Tensor, "batch begun"], Encoded]:
        """Lets the encoder read.

        Args:
            prompt_tokens: Padded left.
            prompt_mask: True where a token is real.

        Returns:
            The prefix, its mask, and what the encoder made of the prompts.
        """
        tokens = self._prefix(prompt_tokens)
        return tokens, torch.ones_like(tokens, dtype=torch.bool), self.encoded(prompt_tokens, prompt_mask)

    def encoded(self, prompt_tokens: Tensor, prompt_mask: Tensor) -> Encoded:
        """What the encoder makes of prompts.

        Args:
            prompt_tokens: (batch, prompt), padded left.
            prompt_mask: (batch, prompt), True where a token is real.

        Returns:
            States and mask, padded right.
        """
        mask = aligned(prompt_mask, prompt_mask, "right")
        return Encoded(self.encode(aligned(prompt_tokens, prompt_mask, "right"), mask), mask)

    def encode(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """The encoder's states of prompts.

        Args:
            tokens: (prompts, prompt), padded right.
            mask: (prompts, prompt), True where a token is real.

        Returns:
            (prompts, prompt, width).
        """
        with attention_kernels(tokens.device):
            return self.model.get_encoder()(input_ids=tokens, attention_mask=mask.long()).last_hidden_state

    def forward(
        self,
        tokens: Int[Tensor, "batch new"],
        mask: Bool[Tensor, "batch total"],
        keep: int,
        cache: Encoded | None = None,
        use_cache: bool = False,
        trunk: Float[Tensor, "batch joined trunk"] | None = None,
        positions: Int[Tensor, "batch new"] | None = None,
    ) -> DecoderOutput:
        """Lets the decoder read tokens, after those in the cache.

        Args:
            tokens: What to read, the prefix included.
            mask: True where a token is real, those in the cache included.
            keep: For how many of the last positions logits are wanted.
            cache: From :meth:`begin` or an earlier call. Without one, the first tokens are the prompt too.
            use_cache: Whether the output should hold a cache.
            trunk: What an earlier call returned for these tokens and prompts; encoder and frozen blocks are not run.
            positions: As there.

        Returns:
            Logits, states, cache, and the trunk if it can be kept.
        """
        width = tokens.shape[1]
        if cache is None:
            first = mask[:, :TRIED]
            cache = self.encoded(tokens[:, :TRIED], first) if trunk is None else _kept(trunk[:, :-width], first)
        kept = None if trunk is None else trunk[:, -width:]
        output = super().forward(tokens, mask, keep, cache, use_cache, kept, positions)
        if output.trunk is not None and cache.past is None:
            output.trunk = torch.cat([aligned(cache.states, cache.mask, "left"), output.trunk], dim=1)
        # Without a past, what was made of the prompts is needed all the same.
        output.cache = replace(cache, past=output.cache)
        return output

    def reading(self, batch: Responses, trunk: Tensor | None) -> Reading:
        """Prompts for the encoder, each of them once, and responses behind the prefix for the decoder.

        Args:
            batch: Prompts and responses; what lies in the padding changes nothing.
            trunk: What encoder and frozen blocks made of them, where it was kept. Not heeded where this model, a
                reference say, has none: it was another's.

        Returns:
            What :meth:`read` reads.
        """
        prompt, prefix = batch.prompt_mask.shape[1], self._prefix(batch.prompt_tokens)
        trunk = None if self.trunk is None else trunk
        written = ResponseBatch(
            prompt_tokens=prefix,
            prompt_mask=torch.ones_like(prefix, dtype=torch.bool),
            response_tokens=batch.response_tokens,
            response_mask=batch.response_mask,
        )
        reading = padded(written, None if trunk is None else trunk[:, prompt:], self.chooses)
        reading.source = source_of(batch, None if trunk is None else trunk[:, :prompt], self.shares)
        return reading

    def run(self, reading: Reading) -> Any:
        """Lets both halves read, or the decoder alone where it is known what the encoder makes of the prompts."""
        source = reading.source
        if source is None:  # tried out
            encoded = self.encoded(reading.tokens[:, :TRIED], torch.ones_like(reading.tokens[:, :TRIED]).bool())
        else:
            states = self.encode(source.tokens, source.mask) if source.states is None else source.states
            encoded = Encoded(states, source.mask)
            if source.of_row is not None:
                encoded.batch_select_indices(source.of_row)
        given = self._given(encoded)
        return self._run(reading.tokens, reading.mask, reading.positions, reading.keep, reading.trunk, **given)

    def _given(self, cache: Encoded) -> dict[str, Any]:
        from transformers.modeling_outputs import BaseModelOutput

        more = {} if cache.past is None else {"past_key_values": cache.past}
        outputs = BaseModelOutput(last_hidden_state=cache.states)
        return {"encoder_outputs": outputs, "attention_mask": cache.mask.long(), **more}

    def _arguments(self, tokens: Tensor, mask: Tensor, positions: Tensor) -> dict[str, Tensor]:
        return {"decoder_input_ids": tokens, "decoder_attention_mask": mask.long()}

    def _prefix(self, prompt_tokens: Tensor) -> Tensor:
        return prompt_tokens.new_tensor(self.prefix).expand(len(prompt_tokens), -1)

    def bears_padding(self, tokens: Int[Tensor, "1 total"], plain: Tensor) -> bool:
        """Whether right padding of the prompt leaves the logits alone.

        Args:
            tokens: A few, unpadded.
            plain: What the model says of the last two of them.

        Returns:
            The answer.

        Raises:
            ValueError: If the model says something else when its halves are called by themselves.
        """
        prompt = tokens[:, :TRIED]
        whole = self.model(input_ids=prompt, decoder_input_ids=tokens, use_cache=False).logits[:, -2:]
        if not same_logits(whole, plain):
            raise ValueError(
                f"`policy={type(self.model).__name__}` does more than to hand what its encoder says to its decoder, "
                "and cannot be trained: take another model."
            )
        longer = torch.cat([torch.zeros_like(tokens), prompt], dim=1)
        is_prompt = torch.arange(longer.shape[1], device=tokens.device)[None] >= tokens.shape[1]
        everything = torch.ones_like(tokens, dtype=torch.bool)
        return same_logits(self(tokens, everything, keep=2, cache=self.encoded(longer, is_prompt)).logits, plain)


def _kept(states: Tensor, mask: Tensor) -> Encoded:
    """From states that were kept as prompts are, padded left."""
    return Encoded(aligned(states, mask, "right"), aligned(mask, mask, "right"))


def _token(model: PreTrainedModel, name: str) -> int | None:
    """A special token of the generation config, or else of the config."""
    for config in (getattr(model, "generation_config", None), model.config):
        token = getattr(config, name, None)
        if token is not None and not isinstance(token, int):
            raise ValueError(
                f"`{name}={token!r}` of `policy={type(model).__name__}` must be one token, behind which every response "
                "begins: set a single id in the model's generation config."
            )
        if token is not None:
            return token
    return None


def _positions(half: nn.Module, side: str) -> int | None:
    """How many positions a half has; in its own config, where it has one, or in that of both."""
    config: Any = half.config
    limits = (getattr(config, name, None) for name in (f"max_{side}_position_embeddings", "max_position_embeddings"))
    return next((limit for limit in limits if limit is not None and limit > 0), None)


def _layers(half: nn.Module, side: str) -> int:
    """How many blocks a half has."""
    config: Any = half.config
    counts = (getattr(config, name, None) for name in (f"num_{side}_layers", f"{side}_layers", "num_hidden_layers"))
    return next((count for count in counts if count is not None), 0)


def _name(model: nn.Module, half: nn.Module) -> str:
    """Under which a half is found."""
    return next(name for name, module in model.named_modules() if module is half) + "."
