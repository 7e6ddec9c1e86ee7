"""What travels between the rooms: prompts, rollouts, scores, experience, rows to imitate, steps, and comparisons."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(slots=True, kw_only=True, eq=False)
class Batch:
    """Rows side by side: every tensor, list and mapping of lists has one entry per row."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """The same rows on another device."""
        return self._mapped(lambda tensor: tensor.to(device, non_blocking=non_blocking), lambda items: items)

    def select(self, rows: Int[Tensor, " rows"]) -> Self:
        """Some of the rows, in the order given."""
        indices = rows.tolist()
        return self._mapped(lambda tensor: tensor[rows], lambda items: [items[i] for i in indices])

    def _mapped(self, of_tensor: Any, of_list: Any) -> Self:
        def mapped(value: Any) -> Any:
            if isinstance(value, Tensor):
                return of_tensor(value)
            if isinstance(value, Batch):
                return value._mapped(of_tensor, of_list)
            if isinstance(value, Mapping):
                return {key: mapped(item) for key, item in value.items()}
            return of_list(value) if isinstance(value, list) else value

        return type(self)(**{f.name: mapped(getattr(self, f.name)) for f in fields(self)})


@dataclass(slots=True, kw_only=True, eq=False)
class PromptBatch(Batch):
    """What the policy reads.

    Attributes:
        prompt_tokens: Padded left.
        prompt_mask: True where a token is real.
        prompts: As the user gave them, strings or chat messages.
        metadata: Every other key of the rows, a list each.
    """

    prompt_tokens: Int[Tensor, "batch prompt"]
    prompt_mask: Bool[Tensor, "batch prompt"]
    prompts: list[Any]
    metadata: dict[str, list[Any]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.prompt_tokens)


@dataclass(slots=True, kw_only=True, eq=False)
class Rollouts(PromptBatch):
    """What the policy read and wrote. Everything per token is aligned with the response.

    Attributes:
        response_tokens: Padded right.
        response_mask: True up to and including the token that ended the response.
        sampled_mask: ``response_mask`` less the tokens that the sampler was forced to emit.
        old_logprobs: Under the policy that sampled, at the sampling temperature, over the whole vocabulary.
        truncated: Whether the response was cut at ``max_new_tokens``.
        responses: Decoded without special tokens.
        values: Read at the state before each token.
        final_values: Value of the state after the last token of a response that was cut off, else 0.
        kept_mass: Probability of what top-k, top-p and min-new-tokens left to draw from.
        importance: Where ``old_logprobs`` are not the sampler's: a token's probability under them over that when it was
            drawn, cut off at a cap. It is what the token counts in the loss.
        trunk: What the lowest block that trains reads, at all tokens but the last, of prompt and response. Of a prompt
            that an encoder reads it is what that makes of it, and between the two lies what a response begins with.
            None where nothing is frozen, or nothing is kept.
    """

    response_tokens: Int[Tensor, "batch response"]
    response_mask: Bool[Tensor, "batch response"]
    sampled_mask: Bool[Tensor, "batch response"]
    old_logprobs: Float[Tensor, "batch response"]
    truncated: Bool[Tensor, " batch"]
    responses: list[str]
    values: Float[Tensor, "batch response"] | None = None
    final_values: Float[Tensor, " batch"] | None = None
    kept_mass: Float[Tensor, "batch response"] | None = None
    importance: Float[Tensor, "batch response"] | None = None
    trunk: Float[Tensor, "batch joined width"] | None = None

    def trimmed(self) -> Self:
        """The same rows without the columns in which every row is padded."""
        prompt = int(self.prompt_mask.sum(1).max())
        response = int(self.response_mask.sum(1).max())

        def trim(name: str, value: Any) -> Any:
            if isinstance(value, Scores):
                return value._mapped(lambda x: x[:, :response] if x.dim() > 1 else x, lambda items: items)
            if not isinstance(value, Tensor) or value.dim() < 2:
                return value
            if name == "trunk":
                width = value.shape[1] - (self.response_tokens.shape[1] - response)
                return value[:, self.prompt_tokens.shape[1] - prompt : width]
            return value[:, -prompt:] if name.startswith("prompt") else value[:, :response]

        return type(self)(**{f.name: trim(f.name, getattr(self, f.name)) for f in fields(self)})

    def with_next_token(self) -> Self:
        """The same rows with a place for the token that would have come next where a response was cut off.

        What only the sampler knows is left out, and so is a trunk, which has no state of the last token.
        """
        length = self.response_mask.sum(1, keepdim=True)
        columns = torch.arange(self.response_mask.shape[1] + 1, device=length.device)[None]
        mask = columns < length + self.truncated[:, None]
        longer: dict[str, Any] = {
            name: torch.nn.functional.pad(getattr(self, name), (0, 1)) for name in ("response_tokens", "old_logprobs")
        }
        nothing: dict[str, Any] = dict.fromkeys(("values", "final_values", "kept_mass", "importance", "trunk"))
        return replace(self, response_mask=mask, sampled_mask=mask, **longer, **nothing)


@dataclass(slots=True, kw_only=True, eq=False)
class Scores(Batch):
    """What the reward gave, as it gave it.

    Attributes:
        total: The weighted sum of all rewards, over the tokens too where one is dense.
        by_name: Each reward's own score, unweighted; NaN where it did not apply.
        token_scores: Where a reward is dense, the weighted sum per token; scores of whole responses lie on the last.
        tokens_by_name: Each dense reward's own scores per token, unweighted; NaN where it did not apply.
    """

    total: Float[Tensor, " batch"]
    by_name: dict[str, Float[Tensor, " batch"]] = field(default_factory=dict)
    token_scores: Float[Tensor, "batch response"] | None = None
    tokens_by_name: dict[str, Float[Tensor, "batch response"]] = field(default_factory=dict)


@dataclass(slots=True, kw_only=True, eq=False)
class Experience(Rollouts):
    """Rollouts with all that a loss reads.

    Attributes:
        scores: What the reward gave.
        advantages: How much better each token did than expected.
        ref_logprobs: Under the reference, where one is run.
        returns: What the values should have been.
        has_signal: Whether the loss of a row has a gradient; all rows have unless the algorithm says otherwise. A row
            without one is left out of the updates, and is still counted where losses are averaged.
        weights: What each token counts in the loss of its global minibatch; a padded one counts 0.
    """

    scores: Scores
    advantages: Float[Tensor, "batch response"]
    ref_logprobs: Float[Tensor, "batch response"] | None = None
    returns: Float[Tensor, "batch response"] | None = None
    has_signal: Bool[Tensor, " batch"] | None = None
    weights: Float[Tensor, "batch response"] | None = None

    @classmethod
    def from_rollouts(cls, rollouts: Rollouts, **more: Any) -> Experience:
        """Adds to rollouts what an algorithm made of them."""
        return cls(**{f.name: getattr(rollouts, f.name) for f in fields(Rollouts)}, **more)


@dataclass(slots=True, kw_only=True, eq=False)
class ResponseBatch(Batch):
    """Prompts, and a response to each.

    Attributes:
        prompt_tokens: Padded left.
        prompt_mask: True where a token is real.
        response_tokens: Padded right.
        response_mask: True where a token is real.
    """

    prompt_tokens: Int[Tensor, "batch prompt"]
    prompt_mask: Bool[Tensor, "batch prompt"]
    response_tokens: Int[Tensor, "batch response"]
    response_mask: Bool[Tensor, "batch response"]

    def __len__(self) -> int:
        return len(self.prompt_tokens)


@dataclass(slots=True, kw_only=True, eq=False)
class ImitationBatch(ResponseBatch):
    """What supervised fine-tuning reads: prompts and the responses to imitate.

    Attributes:
        learnt_mask: True where a token of the response is to be learnt; None where all are. In a conversation the
            response begins with the first turn of the assistant, and what others say after that is not learnt.
    """

    learnt_mask: Bool[Tensor, "batch response"] | None = None

    @property
    def learnt(self) -> Bool[Tensor, "batch response"]:
        """Which tokens are to be learnt."""
        return self.response_mask if self.learnt_mask is None else self.learnt_mask


@dataclass(slots=True, kw_only=True, eq=False)
class UnpairedPreferenceBatch(ResponseBatch):
    """Responses that were judged by themselves.

    Attributes:
        labels: True where a response is as it should be.
        metadata: Every other key of the rows, a list each.
    """

    labels: Bool[Tensor, " batch"]
    metadata: dict[str, list[Any]] = field(default_factory=dict)


@dataclass(slots=True, kw_only=True, eq=False)
class RewardedBatch(ResponseBatch):
    """Responses, and what a reward gave for each.

    Attributes:
        scores: What it gave.
        metadata: Every other key of the rows, a list each.
    """

    scores: Float[Tensor, " batch"]
    metadata: dict[str, list[Any]] = field(default_factory=dict)


@dataclass(slots=True, kw_only=True, eq=False)
class StepBatch(ResponseBatch):
    """Responses that were judged step by step.

    Attributes:
        step_mask: True at the token that ends a step of which somebody said something.
        labels: What was said of the step that ends at a token; 0 elsewhere.
        metadata: Every other key of the rows, a list each.
    """

    step_mask: Bool[Tensor, "batch response"]
    labels: Float[Tensor, "batch response"]
    metadata: dict[str, list[Any]] = field(default_factory=dict)


@dataclass(slots=True, kw_only=True, eq=False)
class PreferenceBatch(Batch):
    """Responses to prompts, and which of them were judged better: two each, or a ranking of more.

    Attributes:
        prompt_tokens: Padded left.
        prompt_mask: True where a token is real.
        response_tokens: The responses to each prompt, the best first, padded right.
        response_mask: True where a token is real; nowhere in a response that is not there.
        ranks: Places of the responses, the best being the lowest; equal ones tie.
        margins: How much better the first of two was judged to be; 0 where nobody said.
        metadata: Every other key of the rows, a list each.
    """

    prompt_tokens: Int[Tensor, "batch prompt"]
    prompt_mask: Bool[Tensor, "batch prompt"]
    response_tokens: Int[Tensor, "batch responses response"]
    response_mask: Bool[Tensor, "batch responses response"]
    ranks: Int[Tensor, "batch responses"]
    margins: Float[Tensor, " batch"]
    metadata: dict[str, list[Any]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.prompt_tokens)

    @property
    def is_there(self) -> Bool[Tensor, "batch responses"]:
        """Which responses there are."""
        return self.response_mask.any(2)

    def rows(self) -> ImitationBatch:
        """Every response with its prompt, those to a prompt one after the other."""
        prompt, response = self.is_there.nonzero().unbind(1)
        return ImitationBatch(
            prompt_tokens=self.prompt_tokens[prompt],
            prompt_mask=self.prompt_mask[prompt],
            response_tokens=self.response_tokens[prompt, response],
            response_mask=self.response_mask[prompt, response],
        )
