"""The policy with its heads, reached through one module's forward."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lightning_rlhf.batches import ResponseBatch, Rollouts
from lightning_rlhf.functional.head import rows_at_once
from lightning_rlhf.models.branches import SharedValues
from lightning_rlhf.models.decoder import Decoder
from lightning_rlhf.models.noise import noisy
from lightning_rlhf.models.passes import in_pieces
from lightning_rlhf.models.reading import Responses
from lightning_rlhf.models.room import check_room
from lightning_rlhf.models.states import head_states, placed


class PolicyOutput(NamedTuple):
    """What a policy says about responses; entry ``t`` belongs to response token ``t``.

    Attributes:
        logprobs: Of the tokens, at the policy's temperature.
        entropy: Of the distributions that they were drawn from, in nats.
        values: Of the states before the tokens; None where the policy says none.
    """

    logprobs: Float[Tensor, "batch response"]
    entropy: Float[Tensor, "batch response"]
    values: Float[Tensor, "batch response"] | None = None


class NextToken(NamedTuple):
    """What a policy says about the token to come.

    Attributes:
        logits: Before division by the temperature.
        values: Of the state before it; None without a value head.
        cache: What the next step needs; None where the whole text is read again.
        trunk: What the lowest block that trains read, at the tokens that were read now; None where nothing is kept.
    """

    logits: Float[Tensor, "batch vocabulary"]
    values: Float[Tensor, " batch"] | None
    cache: Any
    trunk: Float[Tensor, "batch new width"] | None = None

    def repeated(self, times: int) -> NextToken:
        """So many copies of every row, one after the other; the cache is repeated in place.

        Args:
            times: How many.

        Returns:
            What goes on with them.
        """
        if self.cache is not None:
            self.cache.batch_repeat_interleave(times)
        logits, values, trunk = (
            None if tensor is None else tensor.repeat_interleave(times, 0)
            for tensor in (self.logits, self.values, self.trunk)
        )
        assert logits is not None
        return NextToken(logits, values, self.cache, trunk)


class Policy(nn.Module):
    """A language model that writes responses, with an optional value head on its last states.

    Args:
        decoder: The model.
        temperature: What logits are divided by, when sampling and whenever log-probs are taken.
        value_head: Reads the states that the language-modelling head reads.
        value_branch: Says values instead, from the decoder's lower blocks, or with an adapter of its own. The sampler
            does not ask it.

    Attributes:
        noise_alpha: How much noise :func:`noisy` adds while it trains.
    """

    def __init__(
        self,
        decoder: Decoder,
        temperature: float = 1.0,
        value_head: nn.Module | None = None,
        value_branch: SharedValues | None = None,
    ) -> None:
        super().__init__()
        self.decoder = decoder
        self.temperature = temperature
        self.value_head = value_head
        self.value_branch = value_branch
        self.noise_alpha = 0.0

    def forward(self, batch: Responses, with_values: bool = True) -> PolicyOutput:
        """Log-probs, entropies and values of responses.

        Args:
            batch: Prompts and responses; what lies in the padding changes nothing. Where it holds a ``trunk``, what the
                decoder's frozen blocks made of it, these are not run.
            with_values: Whether values are said too, if there is something that does.

        Returns:
            Everything per response token, with gradients.

        Raises:
            ValueError: If prompts are padded and the model cannot be.
        """
        reading = self.decoder.reading(batch, getattr(batch, "trunk", None))
        branch = self.value_branch if with_values else None
        with nullcontext([]) if branch is None else branch.listening(self.decoder, reading) as heard:
            is_noisy = self.training and self.noise_alpha > 0.0
            with noisy(self.decoder.model, reading, batch, self.noise_alpha) if is_noisy else nullcontext():
                said = self.decoder.read(reading, self.temperature)
        values = None
        if branch is not None:
            values = placed(branch(self.decoder, reading, heard), reading, batch)
        elif with_values and self.value_head is not None:
            values = placed(self.value_head(said.states), reading, batch)
        return PolicyOutput(placed(said.logprobs, reading, batch), placed(said.entropy, reading, batch), values)

    def values(self, batch: Responses) -> Float[Tensor, "batch response"]:
        """Values alone: what the policy's own top blocks and head would say is not computed.

        Args:
            batch: As :meth:`forward` takes it.

        Returns:
            Per response token, with gradients.
        """
        reading = self.decoder.reading(batch, getattr(batch, "trunk", None))
        if self.value_branch is not None:
            return placed(self.value_branch.alone(self.decoder, reading), reading, batch)
        assert self.value_head is not None
        return placed(self.value_head(head_states(self.decoder, reading)), reading, batch)

    @torch.no_grad()
    def measured(self, batch: Responses) -> tuple[Float[Tensor, "batch response"], Bool[Tensor, "batch response"]]:
        """How likely responses are, and where they are what the policy would have written.

        Args:
            batch: As :meth:`forward` takes it.

        Returns:
            Log-probs, and True where a token is the likeliest one.
        """
        reading = self.decoder.reading(batch, None)
        said = self.decoder.read(reading, self.temperature)
        head = self.decoder.model.get_output_embeddings()
        states, targets = said.states.flatten(0, 1), reading.targets.flatten()
        rows = rows_at_once(head.weight.shape[0])
        # What some models do to logits behind the head leaves the largest the largest.
        likeliest = [head(some).argmax(-1) for some in states.split(rows)]
        is_likeliest = (torch.cat(likeliest) == targets).view(reading.targets.shape)
        return placed(said.logprobs, reading, batch), placed(is_likeliest, reading, batch)

    def last_states(
        self, tokens: Int[Tensor, "texts total"], mask: Bool[Tensor, "texts total"]
    ) -> Float[Tensor, "texts width"]:
        """The states behind the last tokens of texts, which the head reads to say what comes next.

        Args:
            tokens: Padded left.
            mask: True where a token is real.

        Returns:
            A state of each.
        """
        # A token more, which nobody reads: the state that would predict it is that of the last one.
        one = tokens.new_zeros(len(tokens), 1)
        batch = ResponseBatch(prompt_tokens=tokens, prompt_mask=mask, response_tokens=one, response_mask=one == 0)
        return head_states(self.decoder, self.decoder.reading(batch, None)).reshape(len(tokens), -1)

    def scored(
        self, rollouts: Rollouts, size: int, tokens: int | None = None, most: Callable[[int], int] = int
    ) -> Float[Tensor, "batch response"]:
        """Log-probs of responses, dropout off and without gradients.

        Args:
            rollouts: What was written.
            size: Rows of a forward pass.
            tokens: As in :func:`in_pieces`.
            most: Likewise.

        Returns:
            In single precision or more, 0 in the padding.
        """
        return in_pieces(self, lambda piece: self(piece, with_values=False).logprobs, rollouts, size, tokens, most)

    def check_room(self, prompt_mask: Bool[Tensor, "batch prompt"], max_new_tokens: int) -> None:
        """Refuses prompts that leave no room for a response.

        Args:
            prompt_mask: True where a token is real.
            max_new_tokens: What a response may need.

        Raises:
            ValueError: If prompt and response together would be more than the model has positions.
        """
        check_room(self.decoder, prompt_mask, max_new_tokens, "policy")

    @torch.no_grad()
    def begin(
        self, prompt_tokens: Int[Tensor, "batch prompt"], prompt_mask: Bool[Tensor, "batch prompt"]
    ) -> tuple[Int[Tensor, "batch begun"], Bool[Tensor, "batch begun"], Any]:
        """What stands before the first token of a response; an encoder reads the prompt here.

        Args:
            prompt_tokens: Padded left.
            prompt_mask: True where a token is real.

        Returns:
            Tokens for :meth:`next_token`, their mask, and the cache that goes with them.
        """
        return self.decoder.begin(prompt_tokens, prompt_mask)

    @torch.no_grad()
    def next_token(
        self,
        tokens: Int[Tensor, "batch new"],
        mask: Bool[Tensor, "batch total"],
        cache: Any,
        positions: Int[Tensor, "batch new"] | None = None,
    ) -> NextToken:
        """One step of decoding.

        Args:
            tokens: What has not been read yet.
            mask: True where a token is real, those read before included; with ``positions``, (batch, 1, new, cached),
                True where each looks.
            cache: From :meth:`begin`, then from the step before.
            positions: Of the tokens in their rows; by default as the mask says.

        Returns:
            Logits and value at the last position.
        """
        caches = self.decoder.caches
        output = self.decoder(tokens, mask, keep=1, cache=cache, use_cache=caches, positions=positions)
        values = None if self.value_head is None else self.value_head(output.states)[:, 0]
        return NextToken(output.logits[:, 0], values, output.cache, output.trunk)
