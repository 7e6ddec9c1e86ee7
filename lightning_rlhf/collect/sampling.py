"""Responses to compare, written by one policy or several."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import PurePath
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info

from lightning_rlhf.chance import derived_seed, row_uniforms
from lightning_rlhf.collect.tasks import MOST, Task, digest
from lightning_rlhf.data.formats import Row
from lightning_rlhf.data.prompts import as_prompt_batch
from lightning_rlhf.generation.sampling import Sampling
from lightning_rlhf.modules.sft import SFTModule
from lightning_rlhf.rewards.texts import continuations


class Writers:
    """Policies that take turns: response j to a prompt is written by policy j modulo their number.

    Args:
        policies: Names or folders.
        responses_per_prompt: How many are written to each prompt.
        sampling: How tokens are drawn.
        batch_size: Prompts that are answered side by side.
        seed: The same seed gives the same responses to a prompt, whatever else is written.
        device: Where the policies are; by default on a GPU if there is one.
    """

    def __init__(
        self,
        policies: Sequence[str],
        responses_per_prompt: int = 2,
        sampling: Sampling | None = None,
        batch_size: int = 32,
        seed: int = 0,
        device: str | None = None,
    ) -> None:
        if not 2 <= responses_per_prompt <= MOST:
            raise ValueError(f"`responses_per_prompt={responses_per_prompt}` must lie between 2 and {MOST}.")
        if not 1 <= len(policies) <= responses_per_prompt:
            raise ValueError(
                f"`policies={list(policies)!r}` must be one or more, and at most `responses_per_prompt="
                f"{responses_per_prompt}`: each writes one of the responses, or several."
            )
        if batch_size < 1:
            raise ValueError(f"`batch_size={batch_size}` must be at least 1.")
        self.policies = list(policies)
        self.responses_per_prompt = responses_per_prompt
        self.sampling = sampling or Sampling()
        if self.sampling.temperature == 0 and len(policies) < responses_per_prompt:
            raise ValueError(
                "`sampling.temperature=0` lets a policy write the same response again: raise it, or give as many "
                "`policies` as `responses_per_prompt`."
            )
        self.batch_size = batch_size
        self.seed = seed
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        short = [PurePath(policy).name for policy in self.policies]
        self.names = short if len(set(short)) == len(short) else self.policies
        self._loaded: tuple[str, SFTModule] | None = None

    def key(self, prompt: Any) -> str:
        """Of the task that a prompt becomes; so it is known before anything is written.

        Args:
            prompt: A string or chat messages.

        Returns:
            A digest of all on which the responses depend, but the weights of the policies.
        """
        return digest([prompt, self.policies, self.responses_per_prompt, self.sampling.plain(), self.seed])

    def tasks(self, prompts: Sequence[tuple[Any, Row]]) -> list[Task | None]:
        """Writes responses.

        Args:
            prompts: Strings or chat messages, each with what else is known of it.

        Returns:
            A task for each prompt, or None where all responses are alike.
        """
        count = len(self.policies)
        written: list[list[list[str]]] = []
        for number, policy in enumerate(self.policies):
            share = len(range(number, self.responses_per_prompt, count))
            rank_zero_info(f"{policy} writes {share * len(prompts)} responses.")
            written.append(list(self._written(policy, number, [prompt for prompt, _ in prompts], share)))
        tasks = []
        for row, (prompt, metadata) in enumerate(prompts):
            responses = [written[j % count][row][j // count] for j in range(self.responses_per_prompt)]
            sources = [self.names[j % count] for j in range(self.responses_per_prompt)]
            tasks.append(Task.of(prompt, responses, sources, metadata, self.key(prompt)))
        return tasks

    def _module(self, policy: str) -> SFTModule:
        """A policy, which stays until another is asked for: there is one in memory at a time."""
        if self._loaded is None or self._loaded[0] != policy:
            self._loaded = None
            module = SFTModule(policy)
            module.configure_model()
            self._loaded = policy, module.to(self.device)
        return self._loaded[1]

    def _written(self, policy: str, number: int, prompts: Sequence[Any], share: int) -> Iterator[list[str]]:
        """So many responses of one policy to each prompt, as they follow it: a space at their beginning stays."""
        module = self._module(policy)
        seed = derived_seed(self.seed, "generate", number)
        for start in range(0, len(prompts), self.batch_size):
            some = list(prompts[start : start + self.batch_size])
            batch = as_prompt_batch(some, module.tokenizer, module.policy.decoder.has_encoder).to(module.device)
            rows = [int(digest(prompt)[:14], 16) * MOST + j for prompt in some for j in range(share)]
            uniforms = row_uniforms(seed, "generate", (), rows, self.sampling.max_new_tokens)
            with torch.no_grad():
                rollouts = module.respond(batch, uniforms, self.sampling, group_size=share)
            tokens = [row[mask] for row, mask in zip(rollouts.response_tokens, rollouts.response_mask, strict=True)]
            texts = continuations(rollouts.prompts, rollouts.responses, tokens, module.tokenizer)
            yield from (texts[i : i + share] for i in range(0, len(texts), share))
