"""A task small enough to enumerate: responses of at most three tokens, drawn from three, one of which ends them."""

import itertools
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, PreTrainedTokenizerFast

from lightning_rlhf import PromptDataModule
from tests.training import bare_trainer

LENGTH = 3
PROMPT = "a"

# Every response there is: those that EOS (token 0) ends, and those that are cut off.
RESPONSES = [(*body, 0) for n in range(LENGTH) for body in itertools.product((1, 2), repeat=n)] + list(
    itertools.product((1, 2), repeat=LENGTH)
)


def tokenizer() -> PreTrainedTokenizerFast:
    """`<eos>`, `a` and `b`; no PAD."""
    words = Tokenizer(models.WordLevel({"<eos>": 0, "a": 1, "b": 2}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>")


def config() -> GPT2Config:
    """Initial weights large enough for a start that is far from uniform."""
    return GPT2Config(
        vocab_size=3,
        n_embd=16,
        n_layer=1,
        n_head=2,
        n_positions=8,
        bos_token_id=0,
        eos_token_id=0,
        initializer_range=0.3,
    )


@dataclass
class Table:
    """A reward that is a number per response, drawn by a seed."""

    seed: int

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        self.rewards = torch.randn(len(RESPONSES), generator=generator, dtype=torch.float64)
        self.of = dict(zip(RESPONSES, self.rewards.tolist(), strict=True))

    def score(self, prompts, responses, response_tokens):
        return [self.of[tuple(tokens.tolist())] for tokens in response_tokens]

    def optimum(self, ref_logprobs: torch.Tensor, beta: float) -> torch.Tensor:
        """log pi* = log pi_ref + r / beta - log Z, over all responses."""
        return (ref_logprobs + self.rewards / beta).log_softmax(0)


@torch.no_grad()
def exact_logprobs(policy) -> torch.Tensor:
    """Log-probability of every response there is."""
    tokens = torch.zeros(len(RESPONSES), LENGTH, dtype=torch.long)
    mask = torch.zeros(len(RESPONSES), LENGTH, dtype=torch.bool)
    for i, response in enumerate(RESPONSES):
        tokens[i, : len(response)] = torch.tensor(response)
        mask[i, : len(response)] = True
    prompts = torch.ones(len(RESPONSES), 1, dtype=torch.long)
    batch = SimpleNamespace(
        prompt_tokens=prompts, prompt_mask=prompts.bool(), response_tokens=tokens, response_mask=mask
    )
    return torch.where(mask, policy(batch).logprobs.double(), 0.0).sum(1)


def divergence(logprobs: torch.Tensor, other: torch.Tensor) -> float:
    """KL between two distributions over all responses, in nats."""
    return float((logprobs.exp() * (logprobs - other)).sum())


def train(
    cls: type, reward: Any, iterations: int, batch_size: int, **arguments: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Trains an online module on the one prompt there is.

    Returns:
        Log-probability of every response before and after.
    """
    module = cls(config(), tokenizer=tokenizer(), reward=reward, sampling={"max_new_tokens": LENGTH}, **arguments)
    module.configure_model()
    before = exact_logprobs(module.policy)
    data = PromptDataModule([PROMPT] * (iterations * batch_size), batch_size=batch_size)
    bare_trainer(max_epochs=1).fit(module, datamodule=data)
    return before, exact_logprobs(module.policy)
