"""The decode loop: one for every model, on every device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lightning_rlhf.generation.recorder import Recorder
from lightning_rlhf.generation.sampling import Sampling, draw
from lightning_rlhf.generation.steps import Steps
from lightning_rlhf.models.policy import Policy
from lightning_rlhf.models.vocabulary import SpecialTokens


@dataclass(slots=True)
class Decoded:
    """What was written, and what the policy thought of it on the way.

    Attributes:
        tokens: Padded right.
        mask: True up to and including the token that ended the response.
        logprobs: Of the tokens, under the full distribution at the sampling temperature.
        truncated: Whether the response was cut off.
        values: Of the states before the tokens; None without a value head.
        final_values: Of the state after the last token where the response was cut off, else 0; None if not asked for.
        kept_mass: Probability of what there was to draw from; None where everything was.
        trunk: What the lowest block that trains read, at all tokens but the last; None where it was not to be kept.
    """

    tokens: Int[Tensor, "batch response"]
    mask: Bool[Tensor, "batch response"]
    logprobs: Float[Tensor, "batch response"]
    truncated: Bool[Tensor, " batch"]
    values: Float[Tensor, "batch response"] | None
    final_values: Float[Tensor, " batch"] | None
    kept_mass: Float[Tensor, "batch response"] | None
    trunk: Float[Tensor, "batch joined width"] | None = None


class DecodeLoop:
    """Writes responses token by token.

    A row ends with EOS, with the token that completes a stop string, or at ``max_new_tokens``. Rows that have ended
    leave the batch.

    Args:
        policy: In evaluation mode.
        sampling: How tokens are drawn.
        special: What ends and fills a row.
        stopping: Says of response tokens, (batch, so far), which rows just completed a stop string;
            transformers' ``StopStringCriteria``.
        with_final_values: Whether to read the value after the last token of responses that are cut off.
        trunk_bytes: Memory that the states of frozen blocks may take; more are not kept.
        goes_on: Says, of whether some row here has not ended, whether to read on: where weights are gathered for every
            token, as long as any process does.
        recorder: Records steps, on a GPU; None records none.
    """

    def __init__(
        self,
        policy: Policy,
        sampling: Sampling,
        special: SpecialTokens,
        stopping: Any = None,
        with_final_values: bool = False,
        trunk_bytes: int = 0,
        goes_on: Callable[[bool], bool] = bool,
        recorder: Recorder | None = None,
    ) -> None:
        self.policy = policy
        self.sampling = sampling
        self.special = special
        self.stopping = stopping
        self.with_final_values = with_final_values
        self.trunk_bytes = trunk_bytes
        self.goes_on = goes_on
        self.recorder = recorder

    @torch.no_grad()
    def __call__(
        self,
        prompt_tokens: Int[Tensor, "batch prompt"],
        prompt_mask: Bool[Tensor, "batch prompt"],
        uniforms: Float[Tensor, "responses max_new_tokens"],
        group_size: int = 1,
    ) -> Decoded:
        """Writes responses to every prompt, which is read once for all of them.

        Args:
            prompt_tokens: Padded left.
            prompt_mask: True where a token is real.
            uniforms: What chance says at every token of every response.
            group_size: Responses to each prompt.

        Returns:
            The responses, those to a prompt one after the other.

        Raises:
            ValueError: If a prompt leaves no room for its response, or is padded and the model cannot be.
        """
        self.policy.check_room(prompt_mask, self.sampling.max_new_tokens)
        batch, device = len(prompt_tokens) * group_size, prompt_tokens.device
        out = _Columns(batch, self.sampling.max_new_tokens, self.special.pad, device)
        uniforms = uniforms.to(device)
        eos = torch.tensor(self.special.eos, device=device)

        rows = torch.arange(batch, device=device)  # which rows are still in the batch
        alive = torch.ones(batch, dtype=torch.bool, device=device)  # which of those have not ended
        tokens, mask, cache = self.policy.begin(torch.where(prompt_mask, prompt_tokens, 0), prompt_mask)
        text = _Text(tokens, mask)
        step = Steps(self.policy, cache).read(text)
        if group_size > 1:
            text.repeat(group_size)
            step = step.repeated(group_size)
        steps = self._steps(step.cache, text)
        trunk = _TrunkColumns(step.trunk, self.sampling.max_new_tokens, self.trunk_bytes)
        remaining = batch
        for t in range(self.sampling.max_new_tokens):
            tokens, logprobs, kept = draw(
                step.logits, uniforms[rows, t], self.sampling, self._forbidden(t, step.logits)
            )
            if remaining:
                out.write(t, rows, alive, tokens, logprobs, step.values, kept)
            ended = torch.isin(tokens, eos)
            if self.stopping is not None:
                ended |= self.stopping(out.tokens[rows, : t + 1], None)
            alive &= ~ended
            remaining = int(alive.sum())
            is_last = t + 1 == self.sampling.max_new_tokens
            if not self.goes_on(remaining > 0) or (is_last and not self.with_final_values):
                break
            text.append(tokens)
            index = steps.staying(alive, remaining)
            if index is not None:
                rows, alive = rows[index], alive[index]
                text.select(index)
                steps.select(index)
            step = steps.read(text)
            trunk.write(t, rows, step.trunk)

        out.truncated[rows[alive]] = True
        if self.with_final_values and step.values is not None and bool(alive.any()):
            out.final_values[rows[alive]] = step.values[alive].to(out.final_values.dtype)
        return out.decoded(self.with_final_values, trunk)

    def _steps(self, cache: Any, text: _Text) -> Steps:
        if self.recorder is None:
            return Steps(self.policy, cache)
        return self.recorder.steps(self.policy, cache, text, self.sampling.max_new_tokens)

    def _forbidden(self, t: int, logits: Tensor) -> Tensor | None:
        if t >= self.sampling.min_new_tokens:
            return None
        forbidden = torch.zeros(logits.shape[1], dtype=torch.bool, device=logits.device)
        forbidden[list(self.special.eos)] = True
        return forbidden


@dataclass(slots=True)
class _Text:
    """Everything written so far, prompt and response."""

    tokens: Tensor
    mask: Tensor

    def append(self, tokens: Tensor) -> None:
        self.tokens = torch.cat([self.tokens, tokens[:, None]], dim=1)
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], dim=1)

    def repeat(self, times: int) -> None:
        self.tokens, self.mask = self.tokens.repeat_interleave(times, 0), self.mask.repeat_interleave(times, 0)

    def select(self, index: Tensor) -> None:
        self.tokens, self.mask = self.tokens[index], self.mask[index]


class _Columns:
    """What is written at every step, for all rows of the batch."""

    def __init__(self, batch: int, length: int, pad: int, device: torch.device) -> None:
        def empty() -> Tensor:
            return torch.zeros(batch, length, dtype=torch.float32, device=device)

        self.pad = pad
        self.tokens = torch.full((batch, length), pad, dtype=torch.long, device=device)
        self.mask = torch.zeros(batch, length, dtype=torch.bool, device=device)
        self.logprobs, self.values, self.kept_mass = empty(), empty(), empty()
        self.truncated = torch.zeros(batch, dtype=torch.bool, device=device)
        self.final_values = torch.zeros(batch, dtype=torch.float32, device=device)
        self.length = 0
        self.with_values = self.with_kept_mass = False

    def write(
        self,
        t: int,
        rows: Tensor,
        alive: Tensor,
        tokens: Tensor,
        logprobs: Tensor,
        values: Tensor | None,
        kept_mass: Tensor | None,
    ) -> None:
        """Fills column t of the rows that have not ended, without asking which: a GPU would be waited for."""
        self.length = t + 1
        self.mask[rows, t] = alive
        self.tokens[rows, t] = torch.where(alive, tokens, self.pad)
        self.logprobs[rows, t] = torch.where(alive, logprobs, 0.0)
        self.kept_mass[rows, t] = alive.float() if kept_mass is None else torch.where(alive, kept_mass, 0.0)
        self.with_kept_mass |= kept_mass is not None
        if values is not None:
            self.with_values = True
            self.values[rows, t] = torch.where(alive, values.float(), 0.0)

    def decoded(self, with_final_values: bool, trunk: _TrunkColumns) -> Decoded:
        """The columns that were written."""
        n = self.length
        return Decoded(
            tokens=self.tokens[:, :n],
            mask=self.mask[:, :n],
            logprobs=self.logprobs[:, :n],
            truncated=self.truncated,
            values=self.values[:, :n] if self.with_values else None,
            final_values=self.final_values if with_final_values else None,
            kept_mass=self.kept_mass[:, :n] if self.with_kept_mass else None,
            trunk=trunk.first(n),
        )


class _TrunkColumns:
    """What frozen blocks made of the prompt and of every token, unless that takes too much memory."""

    def __init__(self, prompt: Tensor | None, length: int, limit: int) -> None:
        self.states: Tensor | None = None
        if prompt is None:
            return
        batch, self.width, channels = prompt.shape  # the width of the prompt
        if batch * (self.width + length - 1) * channels * prompt.element_size() <= limit:
            self.states = prompt.new_zeros(batch, self.width + length - 1, channels)
            self.states[:, : self.width] = prompt

    def write(self, t: int, rows: Tensor, states: Tensor | None) -> None:
        """Adds what was made of token t, the last one that was read."""
        if self.states is not None and states is not None and self.width + t < self.states.shape[1]:
            self.states[rows, self.width + t] = states[:, -1]

    def first(self, length: int) -> Tensor | None:
        """Of the prompt and of all but the last of so many tokens."""
        return None if self.states is None else self.states[:, : self.width + length - 1]
