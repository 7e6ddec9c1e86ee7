"""PPO on trlX's random walks in one plain file, for comparison: torch, transformers' `generate` and nothing else.

It stands for what a competent person writes without a library, with the settings of trlX's example. Run it with::

    python -m benchmarks.plain_ppo --graph-seed 1000 --seeds 0 1 2 3 4
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GPT2LMHeadModel, logging

from lightning_rlhf.examples.randomwalks.task import RandomWalks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

RESPONSE = 9  # new tokens at most; a walk has 10 nodes at most


@dataclass
class Settings:
    """PPO as `trlX's example <https://github.com/CarperAI/trlx/tree/main/examples/randomwalks>`_ configures it.

    Args:
        collections: How often episodes are collected and trained on.
        episodes_per_start: Episodes from each of the 20 starts in a collection.
        epochs: Passes over a collection.
        minibatch_size: Episodes per update; the last of an epoch gets those that are left.
        learning_rate: AdamW's, constant.
        linear_decay: Whether the learning rate falls to 0 instead, linearly over all updates.
        betas: AdamW's.
        eps: AdamW's.
        weight_decay: AdamW's.
        max_grad_norm: To which the gradient of all parameters is clipped.
        gamma: Discount.
        gae_lambda: How far advantages look past the values.
        clip_range: Of the policy's ratio.
        value_clip_range: Of the value's change.
        vf_coef: Weight of the value loss.
        reward_clip: To which scores are clipped, on either side of 0.
        whiten: Whether advantages are brought to mean 0 and variance 1, once per collection.
    """

    collections: int = 20
    episodes_per_start: int = 7
    epochs: int = 4
    minibatch_size: int = 100
    learning_rate: float = 3e-4
    linear_decay: bool = False
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 1e-6
    max_grad_norm: float = 1.0
    gamma: float = 1.0
    gae_lambda: float = 0.95
    clip_range: float = 0.2
    value_clip_range: float = 0.2
    vf_coef: float = 1.2
    reward_clip: float = 1.0
    whiten: bool = True


class ActorCritic(nn.Module):
    """A causal language model with a value head on its last hidden state.

    Args:
        model: The language model; it is not copied.
    """

    def __init__(self, model: GPT2LMHeadModel) -> None:
        super().__init__()
        width = model.config.n_embd
        self.model = model
        self.value_head = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, 1))

    def forward(self, prompt_tokens: Tensor, response_tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Computes the log-probability of each response token, and the value of the state that it was drawn in.

        Responses are padded on the right, where a causal model does not see padding from real tokens: no mask.
        """
        tokens = torch.cat([prompt_tokens, response_tokens], dim=1)[:, :-1]  # (batch, prompt + response - 1)
        hidden = self.model.transformer(tokens).last_hidden_state[:, prompt_tokens.shape[1] - 1 :]
        logits = self.model.lm_head(hidden)  # (batch, response, vocabulary)
        logprobs = logits.log_softmax(-1).gather(-1, response_tokens[..., None]).squeeze(-1)
        return logprobs, self.value_head(hidden).squeeze(-1)


def warm_start(
    task: RandomWalks, seed: int, epochs: int = 10, batch_size: int = 25, learning_rate: float = 1e-3
) -> GPT2LMHeadModel:
    """Trains a random network on the task's walks, until it walks at random: its samples score as the walks do.

    Args:
        task: The graph and its walks.
        seed: Draws the weights, the order of the walks and dropout.
        epochs: Passes over the walks.
        batch_size: Walks per update.
        learning_rate: AdamW's at the start; it falls to 0 linearly.

    Returns:
        The language model, in evaluation mode. `save_pretrained` it for others to start from.
    """
    torch.manual_seed(seed)
    tokenizer = task.tokenizer()
    model = GPT2LMHeadModel(task.config())
    ends = [walk + tokenizer.eos_token for walk in task.walks]
    batch = tokenizer(ends, padding=True, padding_side="right", return_tensors="pt")
    tokens, mask = batch["input_ids"], batch["attention_mask"].bool()
    targets = tokens.masked_fill(~mask, -100)[:, 1:]  # the first letter is the prompt
    updates = epochs * -(-len(tokens) // batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, updates)

    model.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(tokens)).split(batch_size):
            logits = model(input_ids=tokens[rows, :-1], attention_mask=mask[rows, :-1]).logits
            loss = F.cross_entropy(logits.flatten(0, 1), targets[rows].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
    return model.eval()


@torch.no_grad()
def generate(
    model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, prompts: list[str], do_sample: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Lets the model answer prompts of one letter, at temperature 1 and from the whole vocabulary, or greedily.

    Returns:
        Prompt tokens `(batch, 1)`, response tokens `(batch, response)`, and the mask of the latter, which is True up to
        and including EOS.
    """
    prompt_tokens = tokenizer(prompts, return_tensors="pt")["input_ids"]
    sampling: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} if do_sample else {}
    tokens = model.generate(
        prompt_tokens,
        attention_mask=torch.ones_like(prompt_tokens),
        max_new_tokens=RESPONSE,
        do_sample=do_sample,
        use_cache=True,
        **sampling,
    )
    response_tokens = tokens[:, prompt_tokens.shape[1] :]
    ended = (response_tokens == tokenizer.eos_token_id).int()
    response_mask = (ended.cumsum(1) - ended) == 0  # no EOS before this token
    return prompt_tokens, response_tokens, response_mask


def advantages_and_returns(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """Estimates advantages by GAE, backwards over the response, all `(batch, response)`; past its end values are 0."""
    values = values * mask
    advantages = torch.zeros_like(values)
    following, next_values = torch.zeros_like(values[:, 0]), torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_values - values[:, t]
        following = (delta + gamma * gae_lambda * following) * mask[:, t]
        advantages[:, t] = following
        next_values = values[:, t]
    return advantages, advantages + values


def train(
    model: GPT2LMHeadModel, task: RandomWalks, seed: int, settings: Settings | None = None
) -> dict[str, float | list[float]]:
    """Trains the model by PPO, in place.

    Args:
        model: The language model to start from, as :func:`warm_start` returns it.
        task: What it is to learn.
        seed: Draws the value head, the episodes and the minibatches.
        settings: How it learns; trlX's settings if None.

    Returns:
        `seconds`, the number of `updates`, and `scores`, the mean of each collection as it was drawn.
    """
    s = settings or Settings()
    torch.manual_seed(seed)
    tokenizer = task.tokenizer()
    network = ActorCritic(model).eval()  # no dropout: the ratio has to be 1 at the first update
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=s.learning_rate, betas=s.betas, eps=s.eps, weight_decay=s.weight_decay
    )
    prompts = task.prompts * s.episodes_per_start
    total = s.collections * s.epochs * -(-len(prompts) // s.minibatch_size)
    updates, means, start = 0, [], time.perf_counter()

    for _ in range(s.collections):
        prompt_tokens, response_tokens, mask = generate(model, tokenizer, prompts)
        responses = tokenizer.batch_decode(response_tokens, skip_special_tokens=True)
        scores = torch.tensor(task.score(prompts, responses))
        means.append(float(scores.mean()))

        with torch.no_grad():
            old_logprobs, old_values = network(prompt_tokens, response_tokens)
        rewards = torch.zeros_like(old_values)
        rewards[torch.arange(len(rewards)), mask.sum(1) - 1] = scores.clamp(-s.reward_clip, s.reward_clip)
        advantages, returns = advantages_and_returns(rewards, old_values, mask, s.gamma, s.gae_lambda)
        if s.whiten:
            variance, mean = torch.var_mean(advantages[mask], correction=0)
            advantages = (advantages - mean) * torch.rsqrt(variance + 1e-8)

        for _ in range(s.epochs):
            for rows in torch.randperm(len(prompts)).split(s.minibatch_size):
                keep = mask[rows]
                logprobs, values = network(prompt_tokens[rows], response_tokens[rows])

                ratio = torch.exp(logprobs - old_logprobs[rows])
                clipped = ratio.clamp(1 - s.clip_range, 1 + s.clip_range)
                policy_loss = -torch.minimum(ratio * advantages[rows], clipped * advantages[rows])

                near = old_values[rows] + (values - old_values[rows]).clamp(-s.value_clip_range, s.value_clip_range)
                value_loss = 0.5 * torch.maximum((values - returns[rows]) ** 2, (near - returns[rows]) ** 2)

                loss = (policy_loss + s.vf_coef * value_loss)[keep].mean()
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(network.parameters(), s.max_grad_norm)
                if s.linear_decay:
                    optimizer.param_groups[0]["lr"] = s.learning_rate * (1 - updates / total)
                optimizer.step()
                updates += 1

    return {"seconds": time.perf_counter() - start, "updates": updates, "scores": means}


def evaluate(model: GPT2LMHeadModel, task: RandomWalks, samples: int = 64, seed: int = 0) -> tuple[float, float]:
    """Scores the model from each of the 20 starts.

    Args:
        model: The language model.
        task: What it should have learnt.
        samples: Responses drawn for each start.
        seed: Draws them; the global generator is left as it was.

    Returns:
        The mean score of the samples, and that of the 20 greedy responses.
    """
    means = []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for do_sample, prompts in ((True, task.prompts * samples), (False, task.prompts)):
            _, response_tokens, _ = generate(model, task.tokenizer(), prompts, do_sample)
            responses = task.tokenizer().batch_decode(response_tokens, skip_special_tokens=True)
            means.append(float(np.mean(task.score(prompts, responses))))
    return means[0], means[1]


def main() -> None:
    """Prints a line per seed: the sampled score before, sampled and greedy after, and seconds of both stages."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--graph-seed", type=int, default=1000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--linear-decay", action="store_true", help="let the learning rate fall to 0")
    parser.add_argument("--save", type=Path, help="folder to write each seed's warm start to, for others to begin from")
    arguments = parser.parse_args()

    logging.set_verbosity_error()  # `generate` drops the all-true mask it was given, then warns that there is none
    logging.disable_progress_bar()
    task = RandomWalks(arguments.graph_seed)
    print(f"graph {task.seed}: the walks score {np.mean(task.score([''] * len(task.walks), task.walks)):.3f}")
    print(f"{'seed':>5}{'before':>9}{'sampled':>9}{'greedy':>9}{'seconds':>9}{'warm start':>12}")
    table = []
    for seed in arguments.seeds:
        start = time.perf_counter()
        model = warm_start(task, seed)
        warm_seconds = time.perf_counter() - start
        if arguments.save is not None:
            folder = arguments.save / f"graph-{task.seed}-seed-{seed}"
            model.save_pretrained(folder)
            task.tokenizer().save_pretrained(folder)
        before, _ = evaluate(model, task)
        seconds = train(model, task, seed, Settings(linear_decay=arguments.linear_decay))["seconds"]
        table.append([before, *evaluate(model, task), seconds, warm_seconds])
        print(f"{seed:>5}" + "{:>9.3f}{:>9.3f}{:>9.3f}{:>9.1f}{:>12.1f}".format(*table[-1]), flush=True)
    print(" mean" + "{:>9.3f}{:>9.3f}{:>9.3f}{:>9.1f}{:>12.1f}".format(*np.mean(table, axis=0)))


if __name__ == "__main__":
    main()
