"""What a module writes: responses to prompts, as tokens and as text."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import lightning as L
import torch
from torch import Tensor

from lightning_rlhf.batches import PromptBatch, Rollouts
from lightning_rlhf.chance import row_uniforms
from lightning_rlhf.data.tokens import padded, prompt_ids
from lightning_rlhf.generation.decode import Decoded, DecodeLoop
from lightning_rlhf.generation.recorder import Recorder
from lightning_rlhf.generation.sampling import Sampling, SamplingLike
from lightning_rlhf.generation.stopping import stop_criteria
from lightning_rlhf.models.policy import Policy
from lightning_rlhf.models.vocabulary import SpecialTokens
from lightning_rlhf.modules.arguments import Remembering
from lightning_rlhf.modules.ranks import any_over_ranks
from lightning_rlhf.strategies.sharding import held


class TextModule(Remembering, L.LightningModule, ABC):
    """A policy that writes.

    Attributes:
        policy: The network, once it is built.
        special_tokens: What ends and fills a row, likewise.
        sampling: How responses are drawn unless a call says otherwise.
        seed: Of everything random.
    """

    policy: Policy
    special_tokens: SpecialTokens
    sampling: Sampling
    seed: int

    def __init__(self) -> None:
        super().__init__()
        self._stopping: dict[tuple[str, ...], Any] = {}
        self._recorder = Recorder()

    @property
    @abstractmethod
    def tokenizer(self) -> Any:
        """Of the policy."""

    @property
    def is_built(self) -> bool:
        """Whether the networks are there."""
        return "policy" in self._modules

    def decode(
        self,
        prompt_tokens: Tensor,
        prompt_mask: Tensor,
        uniforms: Tensor,
        sampling: Sampling,
        with_final_values: bool = False,
        group_size: int = 1,
        trunk_bytes: int = 0,
    ) -> Decoded:
        """Writes responses with the policy as it is, dropout off.

        Args:
            prompt_tokens: (batch, prompt), padded left.
            prompt_mask: (batch, prompt), True where a token is real.
            uniforms: (responses, max_new_tokens), what chance says.
            sampling: How tokens are drawn.
            with_final_values: Whether to read the value after the last token of responses that are cut off.
            group_size: Responses to each prompt.
            trunk_bytes: Memory that kept states of frozen blocks may take.

        Returns:
            The responses, those to a prompt one after the other.
        """
        stopping = self._criteria(sampling.stop)
        holds = getattr(getattr(self._trainer, "strategy", None), "hold_weights", True)
        goes_on = bool if holds else partial(any_over_ranks, device=prompt_tokens.device)
        how = (stopping, with_final_values, trunk_bytes, goes_on, self._recorder)
        loop = DecodeLoop(self.policy, sampling, self.special_tokens, *how)
        with self.quiet(), held(self.policy) if holds else nullcontext(), self._eager():
            try:
                return loop(prompt_tokens, prompt_mask, uniforms, group_size)
            finally:
                self._recorder.rest()

    def teardown(self, stage: str) -> None:
        """Lets go what was recorded, and memory for the next pass; a loop of Lightning's has ended."""
        super().teardown(stage)
        self._recorder.forget()
        if self.is_built:
            self.policy.decoder.spare.clear()

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """The policy without dropout for a while."""
        was_training = self.policy.training
        self.policy.eval()
        try:
            yield
        finally:
            self.policy.train(was_training)

    def _eager(self) -> AbstractContextManager[Any]:
        """Compiled blocks are for passes that train: token by token, every step would be of another shape."""
        return torch.compiler.set_stance("force_eager") if self.policy.decoder.is_compiled else nullcontext()

    def respond(
        self,
        prompts: PromptBatch,
        uniforms: Tensor,
        sampling: Sampling,
        with_final_values: bool = False,
        group_size: int = 1,
        trunk_bytes: int = 0,
    ) -> Rollouts:
        """Writes responses to every prompt of a batch.

        Args:
            prompts: Of this process.
            uniforms: (responses, max_new_tokens), what chance says.
            sampling: How tokens are drawn.
            with_final_values: Whether to read the value after the last token of responses that are cut off.
            group_size: Responses to each prompt.
            trunk_bytes: Memory that kept states of frozen blocks may take.

        Returns:
            What was written, the responses to a prompt one after the other.
        """
        decoded = self.decode(
            prompts.prompt_tokens,
            prompts.prompt_mask,
            uniforms,
            sampling,
            with_final_values,
            group_size,
            trunk_bytes,
        )
        if group_size > 1:
            prompts = prompts.select(torch.arange(len(prompts)).repeat_interleave(group_size))
        return Rollouts(
            prompt_tokens=prompts.prompt_tokens,
            prompt_mask=prompts.prompt_mask,
            prompts=prompts.prompts,
            metadata=prompts.metadata,
            response_tokens=decoded.tokens,
            response_mask=decoded.mask,
            sampled_mask=decoded.mask,
            old_logprobs=decoded.logprobs,
            truncated=decoded.truncated,
            responses=self.texts(decoded.tokens, decoded.mask),
            values=decoded.values,
            final_values=decoded.final_values,
            kept_mass=decoded.kept_mass,
            trunk=decoded.trunk,
        )

    def texts(self, tokens: Tensor, mask: Tensor) -> list[str]:
        """Responses as text, without special tokens.

        Args:
            tokens: (batch, response).
            mask: (batch, response), True where a token is real.

        Returns:
            A string each.
        """
        rows = [row[row_mask].tolist() for row, row_mask in zip(tokens.cpu(), mask.cpu(), strict=True)]
        return self.tokenizer.batch_decode(rows, skip_special_tokens=True)

    def generate(
        self, prompts: Sequence[Any], sampling: SamplingLike = None, batch_size: int = 32, seed: int | None = None
    ) -> list[str]:
        """Writes a response to every prompt.

        Args:
            prompts: Strings, or lists of chat messages.
            sampling: What differs from the module's own sampling, such as ``{"temperature": 0}``.
            batch_size: Prompts that are answered side by side.
            seed: The same seed gives the same responses; the module's own by default.

        Returns:
            The responses, without special tokens.
        """
        if isinstance(prompts, str):
            raise TypeError(f"`prompts={prompts!r}` must be a list of prompts: write [{prompts!r}].")
        if batch_size < 1:
            raise ValueError(f"`batch_size={batch_size}` must be at least 1.")
        if not self.is_built:
            self.configure_model()
        sampling = self.sampling.but(sampling)
        seed = self.seed if seed is None else seed
        responses: list[str] = []
        for start in range(0, len(prompts), batch_size):
            has_encoder = self.policy.decoder.has_encoder
            rows = [prompt_ids(prompt, self.tokenizer, has_encoder) for prompt in prompts[start : start + batch_size]]
            tokens, mask = padded(rows, self.special_tokens.pad, "left")
            uniforms = row_uniforms(seed, "generate", (), range(start, start + len(rows)), sampling.max_new_tokens)
            decoded = self.decode(tokens.to(self.device), mask.to(self.device), uniforms, sampling)
            responses += self.texts(decoded.tokens, decoded.mask)
        return responses

    def _criteria(self, stop: tuple[str, ...]) -> Any:
        """Finds stop strings on ids; made once, since it looks at the whole vocabulary."""
        if stop and stop not in self._stopping:
            self._stopping[stop] = stop_criteria(self.tokenizer, stop)
        return self._stopping.get(stop)
