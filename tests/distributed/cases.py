"""What two processes do under a strategy, and one process on the whole batch; each returns what can be compared.

A case is a function of the strategy's name and a folder that all processes share. Under ``"auto"`` there is one
process, and batches are as large as those of all processes together. Imported by name in the processes themselves.
"""

from __future__ import annotations

import functools
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from peft import LoraConfig, get_peft_model
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, IterableDataset
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

from lightning_rlhf import (
    ConversationDataModule,
    GRPOModule,
    HTTPReward,
    ModelSpec,
    PPOModule,
    PreferenceDataModule,
    ProcessRewardModule,
    PromptDataModule,
    RewardModel,
    RewardModule,
    SFTModule,
    StepDataModule,
)
from lightning_rlhf.batches import PromptBatch
from lightning_rlhf.callbacks import ResponseWriter, ValidationSamples
from lightning_rlhf.data.tokens import padded
from lightning_rlhf.models.reference import fingerprint
from lightning_rlhf.models.weights import whole, whole_state
from lightning_rlhf.modules.building import networks_of
from lightning_rlhf.modules.ranks import rank, world_size
from lightning_rlhf.strategies.fsdp2 import RLHFStrategy
from lightning_rlhf.strategies.sharding import held
from tests.networks import ARCHITECTURES, ENCODER_DECODERS, bigram, network, tiny_gpt2, word_tokenizer
from tests.rewards.test_http import lengths, serving
from tests.training import Seen, bare_trainer

PROMPTS = ["a b c", "d", "e f", "b a a c", "c", "f e d", "b b", "a"]
LETTERS = 8  # of the vocabulary, `<eos>` and `<pad>` among them: one token in eight ends a response
WORDS = 8000  # of the vocabulary of networks whose embedding is to be large
sgd = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)
without_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def early_letters(prompts, responses):
    """A reward in [-1, 1] in which most responses differ."""
    words = [response.split() for response in responses]
    return [sum(1 if word < "d" else -1 for word in row) / max(len(row), 1) for row in words]


def policy_of(num_layers_unfrozen: int = -1, layers: int = 3) -> ModelSpec:
    """A GPT-2 with random weights, the same on all processes."""
    return ModelSpec(tiny_gpt2(LETTERS, layers=layers, initializer_range=0.3), num_layers_unfrozen=num_layers_unfrozen)


def with_adapter() -> ModelSpec:
    """The same with an adapter in its top two blocks, which begins at something: the reference is a copy of it."""
    spec = policy_of()
    spec.adapter = {"peft_type": "LORA", "r": 2, "init_lora_weights": False, "layers_to_transform": [1, 2]}
    return spec


def t5(num_layers_unfrozen: int = -1, layers: int = 2) -> ModelSpec:
    """An encoder-decoder with random weights, likewise."""
    special = {"vocab_size": LETTERS, "eos_token_id": LETTERS - 2, "bos_token_id": LETTERS - 2}
    special |= {"pad_token_id": LETTERS - 1, "decoder_start_token_id": LETTERS - 1}
    config = ENCODER_DECODERS["t5"](num_decoder_layers=layers, initializer_factor=3.0, **special)
    return ModelSpec(config, num_layers_unfrozen=num_layers_unfrozen)


def online(cls: type, policy: Any = None, **arguments: Any) -> Any:
    """An online module that makes one minibatch an epoch, whatever the number of processes."""
    defaults: dict[str, Any] = {
        "tokenizer": word_tokenizer(LETTERS),
        "reward": early_letters,
        "sampling": {"max_new_tokens": 6},
        "num_epochs": 2,
        "minibatch_size": 64,
        "kl_coef": 0.1,
        "optimizer": sgd,
        "seed": 8,
    }
    return cls(policy or policy_of(), **{**defaults, **arguments})


ALGORITHMS: dict[str, Any] = {
    "ppo": functools.partial(online, PPOModule, reward_scaling="running", micro_batch_size=1),
    "ppo_hydra": lambda **more: online(PPOModule, policy_of(2, layers=6), reward_scaling="running", **more),
    "ppo_loss": functools.partial(
        online, PPOModule, kl_in="loss", kl_estimator="k2", averaging="responses", normalize_rewards=True
    ),
    "grpo": functools.partial(online, GRPOModule, group_size=3, micro_batch_size=2),
    "grpo_hydra": lambda **more: online(GRPOModule, policy_of(2, layers=6), group_size=4, divide_by_std=False, **more),
    "ppo_lora": lambda **more: online(PPOModule, with_adapter(), micro_batch_size=1, **more),
    "ppo_t5": lambda **more: online(PPOModule, t5(), micro_batch_size=2, **more),
    "ppo_branch": lambda **more: online(PPOModule, policy_of(1, layers=4), num_value_layers_unfrozen=2, **more),
    "ppo_t5_branch": lambda **more: online(PPOModule, t5(), num_value_layers_unfrozen=1, vf_coef=0.1, **more),
    "ppo_critic": lambda **more: online(PPOModule, critic=policy_of(2, layers=4), micro_batch_size=2, **more),
    "ppo_value_adapter": lambda **more: online(PPOModule, with_adapter(), critic="policy", micro_batch_size=2, **more),
    "ppo_recomputed": lambda **more: online(
        PPOModule, replace(with_adapter(), gradient_checkpointing=True), critic="policy", micro_batch_size=2, **more
    ),
    "grpo_t5_hydra": lambda **more: online(GRPOModule, t5(1, layers=3), group_size=3, **more),
    # Scores of two or three values: in many groups all are equal, and nothing else has a gradient.
    "grpo_silent": functools.partial(
        online, GRPOModule, group_size=2, kl_coef=0.0, reward_clip=0.01, averaging="tokens", micro_batch_size=1
    ),
}


def norm_of(optimizer: Any) -> float:
    """Of the gradients of all that it updates."""
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    return float(whole(torch.nn.utils.get_total_norm(gradients)))


class Watch(Seen):
    """Also keeps the norms of gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.norms: list[float] = []

    def on_before_optimizer_step(self, trainer, module, optimizer) -> None:
        if not module.automatic_optimization:
            self.norms.append(norm_of(optimizer))


class Measured:
    """Keeps the norms of gradients once they are those of a mean, which callbacks come too early for."""

    def on_before_optimizer_step(self, optimizer) -> None:
        super().on_before_optimizer_step(optimizer)
        watch = next(callback for callback in self.trainer.callbacks if isinstance(callback, Watch))
        watch.norms.append(norm_of(optimizer))


class MeasuredSFT(Measured, SFTModule):
    """One that imitates."""


class MeasuredSteps(Measured, ProcessRewardModule):
    """A process reward model that keeps them."""


class MeasuredReward(Measured, RewardModule):
    """One that learns to score."""


def trainer_of(strategy: Any, **flags: Any) -> Any:
    """All processes of the group, or this one alone."""
    strategy = strategy if isinstance(strategy, str) else strategy()
    return bare_trainer(strategy=strategy, devices=1 if strategy == "auto" else 2, **flags)


def per_process(size: int, strategy: str) -> int:
    """What each process gets of a batch."""
    return size if strategy == "auto" else size // 2


def fit(module: Any, data: Any, strategy: str, ckpt_path: Any = None, **flags: Any) -> dict[str, Any]:
    """Trains, and returns all that is to be the same on one process and on two."""
    watch = Watch()
    callbacks = [*flags.pop("callbacks", []), watch]
    trainer = trainer_of(strategy, callbacks=callbacks, **{"max_epochs": 3, **flags})
    if isinstance(data, DataLoader):
        trainer.fit(module, data, ckpt_path=ckpt_path)
    else:
        trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return {
        "norms": watch.norms,
        "metrics": [
            {name: value for name, value in of_iteration.items() if not name.startswith(("time/", "speed/"))}
            for of_iteration in watch.metrics
        ],
        "experiences": [experience_of(experience) for experience in watch.experiences],
        "weights": weights_of(module),
        "moments": module.scaled.moments.tolist() if hasattr(module, "scaled") else None,
        "world": (rank(), world_size()),
    }


def weights_of(module: Any) -> Any:
    """All of a module's weights, put together where they are sharded."""
    networks = [module.policy] if module.critic is None else [module.policy, module.critic]
    return torch.cat([value.flatten() for network in networks for _, value in sorted(whole_state(network).items())])


def experience_of(experience: Any) -> dict[str, Any]:
    """Row by row, without padding."""
    rows = [mask.nonzero().flatten() for mask in experience.response_mask]
    scaled = experience.advantages
    return {
        "prompts": experience.prompts,
        "responses": experience.responses,
        "tokens": [tokens[row].tolist() for tokens, row in zip(experience.response_tokens, rows, strict=True)],
        "advantages": [values[row].tolist() for values, row in zip(scaled, rows, strict=True)],
        "scores": experience.scores.total.tolist(),
    }


def learns(name: str, strategy: str, folder: Path) -> dict[str, Any]:
    """Three iterations of an algorithm on eight prompts."""
    data = PromptDataModule(PROMPTS, batch_size=per_process(8, strategy), seed=3)
    return fit(ALGORITHMS[name](), data, strategy)


ppo = functools.partial(learns, "ppo")
ppo_hydra = functools.partial(learns, "ppo_hydra")
ppo_loss = functools.partial(learns, "ppo_loss")
ppo_lora = functools.partial(learns, "ppo_lora")
grpo = functools.partial(learns, "grpo")
grpo_silent = functools.partial(learns, "grpo_silent")
grpo_hydra = functools.partial(learns, "grpo_hydra")


def by_the_first(write: Any, folder: Path) -> None:
    """Lets one process write folders, and the others wait for them."""
    done = folder / "done"
    if os.environ.get("LOCAL_RANK", "0") == "0":
        write(folder)
        done.touch()
    while not done.exists():
        time.sleep(0.02)


def _policy_reference_judge(folder: Path) -> None:
    shape = {"vocab_size": LETTERS - 1, "bos_token_id": LETTERS - 2, "eos_token_id": LETTERS - 2, "pad_token_id": None}
    for name, layers, seed in (("policy", 3, 1), ("reference", 2, 2)):
        network(ARCHITECTURES["llama"](num_hidden_layers=layers, **shape), seed=seed).save_pretrained(folder / name)
    classifier().save_pretrained(folder / "judge")
    word_tokenizer(LETTERS).save_pretrained(folder / "judge")


def ppo_named(strategy: str, folder: Path) -> dict[str, Any]:
    """Policy, reference and reward model from folders; tokens without a row of their own."""
    by_the_first(_policy_reference_judge, folder)
    policy, reference = ModelSpec(folder / "policy"), folder / "reference"
    module = online(PPOModule, policy, reference=reference, reward=folder / "judge", micro_batch_size=2)
    return fit(module, PromptDataModule(PROMPTS, batch_size=per_process(8, strategy), seed=3), strategy)


def _model_and_adapter(folder: Path) -> None:
    network(tiny_gpt2(LETTERS, layers=3), seed=1).save_pretrained(folder / "model")
    word_tokenizer(LETTERS).save_pretrained(folder / "model")
    spec = ModelSpec(folder / "model", adapter={"peft_type": "LORA", "r": 2, "init_lora_weights": False})
    RewardModule(spec, seed=2).save_pretrained(folder / "judge", merge_adapter=False)


def ppo_reward_adapter(strategy: str, folder: Path) -> dict[str, Any]:
    """Policy, values and reward are three adapters on one model."""
    by_the_first(_model_and_adapter, folder)
    spec = ModelSpec(folder / "model", adapter={"peft_type": "LORA", "r": 2})
    reward = RewardModel(folder / "judge", batch_tokens=18)
    module = online(PPOModule, spec, reward=reward, critic="policy", micro_batch_size=2)
    return fit(module, PromptDataModule(PROMPTS, batch_size=per_process(8, strategy), seed=3), strategy)


ppo_t5 = functools.partial(learns, "ppo_t5")
ppo_branch = functools.partial(learns, "ppo_branch")
ppo_t5_branch = functools.partial(learns, "ppo_t5_branch")
ppo_critic = functools.partial(learns, "ppo_critic")
ppo_value_adapter = functools.partial(learns, "ppo_value_adapter")
ppo_recomputed = functools.partial(learns, "ppo_recomputed")
grpo_t5_hydra = functools.partial(learns, "grpo_t5_hydra")


TEXTS = [
    "a b c d e f",
    "a",
    "c c",
    "d e f a b c d",
    "b",
    "f e",
    "a a a",
    {
        "messages": [
            {"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, "abcd", strict=True)
        ]
    },
    "b c d e",
    "f",
    "a b",
    "c d e f a b c",
]


class Streamed:
    """Texts without a length."""

    def __iter__(self):
        yield from TEXTS


def imitator() -> MeasuredSFT:
    """A small one, whose tokenizer knows conversations."""
    tokenizer = word_tokenizer(LETTERS)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }} {% if m.role == 'assistant' %}<eos> {% endif %}{% endfor %}"
    )
    policy = tiny_gpt2(LETTERS, layers=2, initializer_range=0.3, **without_dropout)
    sampling = {"max_new_tokens": 4}
    return MeasuredSFT(policy, tokenizer=tokenizer, optimizer=sgd, seed=8, evaluation_sampling=sampling)


def sft(strategy: str, folder: Path) -> dict[str, Any]:
    """Windows of two batches with uneven counts of tokens, a last one of one, and validations of uneven shares."""
    data = ConversationDataModule(TEXTS, validation=TEXTS[1:8], batch_size=per_process(4, strategy), seed=3)
    samples = ValidationSamples(num_rows=2, console=False)
    return fit(imitator(), data, strategy, accumulate_grad_batches=2, gradient_clip_val=0.5, callbacks=[samples])


def sft_streamed(strategy: str, folder: Path) -> dict[str, Any]:
    """The same of a stream, of which every process reads all."""
    data = ConversationDataModule(Streamed(), batch_size=per_process(4, strategy))
    return fit(imitator(), data, strategy, accumulate_grad_batches=2, max_epochs=2)


def reward_model(strategy: str, folder: Path) -> dict[str, Any]:
    """Pairs and rankings in windows of two batches, and an evaluation in which each process sees groups of its own."""
    rows: list[dict[str, Any]] = [
        {"prompt": prompt, "chosen": better, "rejected": worse, "margin": 0.1 * i, "book": f"book {i % 4}"}
        for texts in (PROMPTS, PROMPTS[::-1])
        for i, (prompt, better, worse) in enumerate(zip(texts, texts[1:], texts[2:], strict=False))
    ]
    rows += [
        {"prompt": "a", "responses": PROMPTS[2:6], "ranks": [2, 1, 4, 3]},
        {"prompt": "f", "responses": PROMPTS[:3], "ranks": [1, 2, 2]},
    ]
    module = MeasuredReward(
        tiny_gpt2(LETTERS, layers=2, initializer_range=0.3),
        tokenizer=word_tokenizer(LETTERS),
        optimizer=sgd,
        center_coef=0.01,
        group_by="book",
        seed=8,
    )
    data = PreferenceDataModule(rows, validation=rows[:5], batch_size=per_process(4, strategy), seed=3)
    result = fit(module, data, strategy, accumulate_grad_batches=2, gradient_clip_val=0.5)
    module.save_pretrained(folder / "judge")
    if dist.is_initialized():
        dist.barrier()
    judge = RewardModel(folder / "judge")
    return {**result, "exported": judge(PROMPTS[:3], PROMPTS[1:4]), "scores": (module.mean, module.std)}


def process_reward(strategy: str, folder: Path) -> dict[str, Any]:
    """Steps in windows of two batches, unlike numbers of them on each process; then they judge what a policy writes."""
    rows = [
        {"prompt": prompt, "steps": texts[: 1 + i % 3], "labels": [(i + k) % 2 for k in range(1 + i % 3)]}
        for some in (PROMPTS, PROMPTS[::-1])
        for i, (prompt, *texts) in enumerate(zip(some, some[1:], some[3:], some[2:], strict=False))
    ]
    module = MeasuredSteps(
        tiny_gpt2(LETTERS, layers=2, initializer_range=0.3),
        tokenizer=word_tokenizer(LETTERS),
        optimizer=sgd,
        separator=" c ",
        seed=8,
    )
    data = StepDataModule(_without("c", rows), validation=_without("c", rows[:3]), batch_size=per_process(4, strategy))
    result = fit(module, data, strategy, accumulate_grad_batches=2, gradient_clip_val=0.5)
    module.save_pretrained(folder / "steps")
    if dist.is_initialized():
        dist.barrier()
    policy = online(PPOModule, reward=str(folder / "steps"))
    prompts = PromptDataModule(PROMPTS[:5], batch_size=per_process(6, strategy), seed=3)
    judged = fit(policy, prompts, strategy, max_epochs=1)["experiences"][0]
    tokens = [torch.tensor(row) for row in judged["tokens"]]
    texts = judged["prompts"], judged["responses"], tokens, word_tokenizer(LETTERS)
    expected = [sum(row) for row in RewardModel(folder / "steps", batch_tokens=1)(*texts)]
    return {**result, "judged": judged["scores"], "expected": expected}


def _without(letter: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same steps, which do not hold what stands between them."""
    return [{**row, "steps": [step.replace(letter, "d") for step in row["steps"]]} for row in rows]


def unlike_objects(strategy: str, folder: Path) -> dict[str, Any]:
    """The policy is a model that has other weights on the second process."""
    model = network(tiny_gpt2(LETTERS, layers=2), seed=rank())
    data = PromptDataModule(PROMPTS, batch_size=per_process(8, strategy), seed=3)
    return fit(online(PPOModule, ModelSpec(model)), data, strategy)


def one_writes_on(strategy: str, folder: Path, **arguments: Any) -> dict[str, Any]:
    """All that the second process writes ends at once, while the first writes on to the limit."""
    table = torch.full((LETTERS, LETTERS), 1e-9)
    table[0, LETTERS - 2] = 1.0  # after an `a` comes the end,
    table[1:, 1] = table[1:, 2] = 0.5  # after anything else a `b` or a `c`
    module = online(PPOModule, bigram(table / table.sum(1, keepdim=True)), **arguments)
    data = PromptDataModule(["b", "a"] * 3, batch_size=per_process(6, strategy), shuffle=False)
    return fit(module, data, strategy, max_epochs=2)


unlike_lengths = functools.partial(one_writes_on, micro_batch_size=1)
# Three passes of one row on the first process, of 1 + 6 tokens each, and one of three rows on the second.
unlike_passes = functools.partial(one_writes_on, micro_batch_tokens=8, recompute_logprobs=True, importance_cap=2.0)


class Dealt(IterableDataset):
    """Five prompts, dealt to the processes in turn; Lightning leaves it as it is."""

    def __iter__(self):
        return iter(PROMPTS[:5][rank() :: world_size()])


def of_words(prompts: list[str]) -> PromptBatch:
    """A batch as a user may make it."""
    vocabulary = word_tokenizer(LETTERS).get_vocab()
    tokens, mask = padded([[vocabulary[word] for word in prompt.split()] for prompt in prompts], LETTERS - 1, "left")
    return PromptBatch(prompt_tokens=tokens, prompt_mask=mask, prompts=list(prompts))


def uneven_rows(strategy: str, folder: Path) -> dict[str, Any]:
    """Three rows on the first process, two on the second."""
    loader = DataLoader(Dealt(), batch_size=5, collate_fn=of_words)
    return fit(online(PPOModule, micro_batch_size=2), loader, strategy, max_epochs=2)


def classifier(seed: int = 0) -> Any:
    """A reward model of random weights."""
    torch.manual_seed(seed)
    config = tiny_gpt2(LETTERS, layers=2, initializer_range=0.3, num_labels=1)
    return AutoModelForSequenceClassification.from_config(config)


def judged(strategy: str, folder: Path, sharded: bool = True) -> dict[str, Any]:
    """Two iterations on a reward model, of unlike weights at first, which scores each process's own rows."""
    reward = RewardModel(
        classifier(rank()), tokenizer=word_tokenizer(LETTERS), append_eos=True, batch_tokens=18, sharded=sharded
    )
    most = []
    data = PromptDataModule(PROMPTS, validation=["a b"], batch_size=per_process(8, strategy), seed=3)
    module = online(PPOModule, reward=reward, normalize_rewards=True)
    result = fit(module, data, strategy, max_epochs=2, callbacks=[Passes(reward, most)])
    expected = classifier().eval()
    for experience in result["experiences"]:
        texts = [f"{p} {r}".split() for p, r in zip(experience["prompts"], experience["responses"], strict=True)]
        rows = [[ord(word) - ord("a") for word in words] + [LETTERS - 2] for words in texts]
        with torch.no_grad():  # one by one, without padding
            experience["expected"] = [float(expected(torch.tensor([row])).logits) for row in rows]
    judge = reward.classifier.model
    local = sum((p.to_local() if hasattr(p, "to_local") else p).numel() for p in judge.parameters())
    return {**result, "judge": fingerprint(judge), "here": local, "passes": most}


class Passes(Callback):
    """Counts the forward passes of a reward model in every iteration: those that its rows need, and all."""

    def __init__(self, reward: RewardModel, counts: list[Any]) -> None:
        self.reward, self.counts = reward, counts
        self.needed = self.made = 0

    def on_train_start(self, trainer, module) -> None:
        most = self.reward.most
        self.reward.classifier.model.register_forward_hook(self._count)
        self.reward.most = lambda number: self._need(number, most(number))

    def _need(self, number: int, most: int) -> int:
        self.needed += number
        return most

    def _count(self, *args: Any) -> None:
        self.made += 1

    def on_train_batch_start(self, trainer, module, *args) -> None:
        self.needed = self.made = 0

    def on_train_batch_end(self, trainer, module, *args) -> None:
        self.counts.append((self.needed, self.made))


judged_whole = functools.partial(judged, sharded=False)


def failing_beside(strategy: str, folder: Path) -> str:
    """What is said where, beside a reward model, another reward fails on the second process alone."""

    def judge(prompts, responses):
        if rank() == 1:
            raise KeyError("answer")
        return [0.0] * len(responses)

    model = RewardModel(classifier(), tokenizer=word_tokenizer(LETTERS))
    try:
        fit(online(PPOModule, reward=[model, judge]), PromptDataModule(PROMPTS, batch_size=4), strategy, max_epochs=1)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def failing_endpoint(strategy: str, folder: Path) -> str:
    """What is said where, of an endpoint for each process, that of the second alone refuses a response."""

    def answer(number: int, body: Any) -> Any:
        return (400, "no", {}) if rank() == 1 and number == 1 else lengths(number, body)

    with serving(answer) as server:
        reward = HTTPReward(server.url, batch_size=2, concurrency=1, name="judge")
        try:
            data = PromptDataModule(PROMPTS, batch_size=4, seed=3)
            fit(online(PPOModule, reward=reward), data, strategy, max_epochs=1)
        except Exception as error:
            return f"{len(server.bodies)} {type(error).__name__}: {error}"
    return "nothing"


def failing_ties(strategy: str, folder: Path) -> list[str]:
    """What is said where, while learning and measuring, of a tie that the second process alone sees."""
    pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
    rows = [pair, {**pair, "tie": True}]
    said = []
    for arguments in ({"preferences": rows}, {"validation": rows}):
        module = MeasuredReward(tiny_gpt2(LETTERS), tokenizer=word_tokenizer(LETTERS), optimizer=sgd, seed=8)
        trainer = trainer_of(strategy, max_epochs=1)
        data = PreferenceDataModule(**arguments, batch_size=1, shuffle=False)
        try:
            (trainer.fit if data.rows else trainer.validate)(module, datamodule=data)
        except Exception as error:
            said.append(f"{type(error).__name__}: {error}")
    return said


def eight_bit(strategy: str, folder: Path) -> dict[str, Any]:
    """Three iterations under 8-bit Adam."""
    optimizer = functools.partial(bnb.optim.AdamW8bit, lr=1e-3, min_8bit_size=64)
    data = PromptDataModule(PROMPTS, batch_size=per_process(8, strategy), seed=3)
    return fit(online(PPOModule, optimizer=optimizer), data, strategy)


def eight_bit_refused(strategy: str, folder: Path) -> str:
    """What is said where 8-bit Adam meets shards."""
    try:
        eight_bit(strategy, folder)
    except ValueError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def filled_up(strategy: str, folder: Path) -> dict[str, Any]:
    """Five prompts where two processes want as many each."""
    data = PromptDataModule(PROMPTS[:5], batch_size=2, shuffle=False)
    return fit(online(PPOModule), data, strategy, max_epochs=1)


def plain_loader(strategy: str, folder: Path) -> dict[str, Any]:
    """A loader of the user's own, which knows of no other process."""
    loader = DataLoader(PROMPTS, batch_size=4, collate_fn=of_words)
    return fit(online(PPOModule), loader, strategy, max_epochs=1)


class Local(Callback):
    """Keeps this process's gradients as they are between two micro-batches."""

    def __init__(self) -> None:
        self.norms: list[float] = []

    def on_after_backward(self, trainer, module) -> None:
        grad = module.policy.value_head.hidden.weight.grad
        grad = grad.to_local() if hasattr(grad, "to_local") else grad  # of a shard there is a part here
        self.norms.append(float(grad.norm()))


def added_up(strategy: str, folder: Path) -> list[float]:
    """One update of two micro-batches: the gradient after each."""
    local = Local()
    module = online(PPOModule, num_epochs=1, micro_batch_size=2)
    data = PromptDataModule(PROMPTS, batch_size=4, seed=3)
    trainer_of(strategy, callbacks=[local], max_epochs=1, limit_train_batches=1).fit(module, datamodule=data)
    return local.norms


def resumed_by(build: Any, strategy: str, folder: Path) -> dict[str, Any]:
    """A run of four iterations, and one that goes on from the middle of its second epoch."""
    both = []
    for place in (None, "kept/step=6.ckpt"):
        keep = ModelCheckpoint(
            folder / "kept", filename="{step}", save_top_k=-1, every_n_train_steps=2, save_on_train_epoch_end=False
        )
        callbacks = [keep] if place is None else []
        both.append(
            fit(
                build(reward_scaling="running", normalize_rewards=True, lr_scheduler="linear"),
                PromptDataModule(PROMPTS, batch_size=2, seed=3),
                strategy,
                ckpt_path=place and folder / place,
                callbacks=callbacks,
                enable_checkpointing=place is None,
                max_epochs=2,
            )
        )
    return {"whole": both[0], "rest": both[1]}


resumed = functools.partial(resumed_by, functools.partial(online, PPOModule, policy_of(2, layers=6)))
resumed_whole = functools.partial(resumed_by, functools.partial(online, PPOModule))
resumed_lora = functools.partial(resumed_by, lambda **more: online(PPOModule, with_adapter(), **more))
resumed_critic = functools.partial(resumed_by, functools.partial(online, PPOModule, critic=policy_of(1)))
resumed_t5 = functools.partial(resumed_by, lambda **more: online(PPOModule, t5(1, layers=3), **more))
resumed_grpo = functools.partial(resumed_by, functools.partial(online, GRPOModule, group_size=4))


def in_step(strategy: str, folder: Path) -> dict[str, Any]:
    """What is written with the policy left in shards, by processes of which one is done at once."""
    strategy = functools.partial(RLHFStrategy, hold_weights=False)
    return {**one_writes_on(strategy, folder, micro_batch_size=1), "gathers": gathered(strategy, folder)}


def one_file(strategy: str, folder: Path) -> dict[str, Any]:
    """A run that goes on from a checkpoint that the first process put together."""
    build = functools.partial(online, PPOModule, policy_of(2, layers=6))
    result = resumed_by(build, functools.partial(RLHFStrategy, save_distributed_checkpoint=False), folder)
    return {**result, "is_file": (folder / "kept/step=6.ckpt").is_file()}


def gathered(strategy: str, folder: Path) -> list[int]:
    """How often weights are gathered to write one token, three, or six."""
    module = online(PPOModule)
    trainer_of(strategy, max_epochs=1).fit(module, datamodule=PromptDataModule(PROMPTS, batch_size=4))
    counts = []
    gather = dist.all_gather_single
    for length in (1, 3, 6):
        calls: list[int] = []
        dist.all_gather_single = lambda *args, calls=calls, **more: calls.append(1) or gather(*args, **more)
        module.generate(["a b"], {"max_new_tokens": length, "min_new_tokens": length})
        counts.append(len(calls))
    dist.all_gather_single = gather
    return counts


def exported_by(policy: Any, auto: Any, strategy: str, folder: Path, **options: Any) -> float:
    """How far a folder's weights are from those that were sharded."""
    module = online(PPOModule, policy())
    trainer_of(strategy, max_epochs=1).fit(module, datamodule=PromptDataModule(PROMPTS, batch_size=4))
    module.save_pretrained(folder / "out", **options)
    dist.barrier()
    saved = auto.from_pretrained(folder / "out").state_dict()
    own = whole_state(module.policy.decoder.model)
    return max(float((saved[name] - weight).abs().max()) for name, weight in own.items())


exported = functools.partial(exported_by, functools.partial(policy_of, 2), AutoModelForCausalLM)
exported_t5 = functools.partial(exported_by, t5, AutoModelForSeq2SeqLM)


def exported_lora(strategy: str, folder: Path) -> float:
    """How far the logits of a merged folder are from those of the shards it was made of."""
    module = online(PPOModule, with_adapter())
    trainer_of(strategy, max_epochs=1).fit(module, datamodule=PromptDataModule(PROMPTS, batch_size=4))
    module.save_pretrained(folder / "out", merge_adapter=True)
    dist.barrier()
    tokens, mask = module.policy.decoder.sample()
    with torch.no_grad(), held(module.policy):
        own = module.policy.decoder(tokens, mask, keep=4).logits
        saved = AutoModelForCausalLM.from_pretrained(folder / "out")(input_ids=tokens).logits[:, -4:]
    return float((saved - own).abs().max())


class Largest(TorchDispatchMode):
    """The memory of the largest tensor that was made, in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor) and not isinstance(tensor, DTensor) and not tensor.is_meta:
                self.size = max(self.size, tensor.untyped_storage().nbytes())
        return output


def _networks(folder: Path) -> None:
    shape = {"vocab_size": WORDS, "bos_token_id": 0, "eos_token_id": WORDS - 2, "pad_token_id": WORDS - 1}
    network(tiny_gpt2(WORDS)).save_pretrained(folder / "gpt2")
    network(ARCHITECTURES["llama"](**shape)).save_pretrained(folder / "llama")
    less = {**shape, "vocab_size": WORDS - 4, "eos_token_id": 0, "pad_token_id": 0}
    network(ARCHITECTURES["llama"](**less), seed=1).save_pretrained(folder / "more")
    t5 = ENCODER_DECODERS["t5"](num_decoder_layers=3, **shape, decoder_start_token_id=WORDS - 1)
    network(t5).save_pretrained(folder / "t5")
    AutoModelForSequenceClassification.from_config(tiny_gpt2(WORDS, num_labels=1)).save_pretrained(folder / "judge")
    word_tokenizer(WORDS).save_pretrained(folder / "judge")
    fields = LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj"], modules_to_save=["lm_head"])
    get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "llama"), fields).save_pretrained(folder / "adapter")


def networks_from(folder: Path) -> dict[str, dict[str, Any]]:
    """Networks with an embedding of 8,000 rows, the largest of their weights."""
    gpt2, llama, more, t5, judge = (folder / name for name in ("gpt2", "llama", "more", "t5", "judge"))
    return {
        "hydra": {"policy": ModelSpec(gpt2, num_layers_unfrozen=1), "reward": judge},
        "everything": {"policy": llama},
        "new_tokens": {"policy": more, "reference": llama},
        "adapter": {"policy": ModelSpec(llama, adapter=folder / "adapter")},
        "encoder_decoder": {"policy": ModelSpec(t5, num_layers_unfrozen=1), "reference": t5},
    }


def spread(strategy: str, folder: Path) -> dict[str, Any]:
    """How far weights and buffers that were dealt out are from those that were read whole, and what it took."""
    results = {}
    by_the_first(_networks, folder)
    once, again, tokenizer = networks_from(folder), networks_from(folder), word_tokenizer(WORDS)
    for name, arguments in once.items():
        whole = online(PPOModule, **again[name], tokenizer=tokenizer)
        whole.configure_model()
        module = online(PPOModule, **arguments, tokenizer=tokenizer)
        trainer = trainer_of(strategy, max_epochs=1, limit_train_batches=0)
        with Largest() as largest:
            trainer.fit(module, datamodule=PromptDataModule(PROMPTS, batch_size=4))
        differences = []
        for ours, theirs in zip(networks_of(module.built()), networks_of(whole.built()), strict=True):
            mine, other = ({**dict(n.named_buffers()), **whole_state(n)} for n in (ours, theirs))
            assert mine.keys() == other.keys()
            differences += [float((mine[key].float() - other[key].float()).abs().max()) for key in mine]
        results[name] = {"difference": max(differences), "count": len(differences), "largest": largest.size}
    return results


class TellTheSecond(Callback):
    """Sends SIGTERM to the second process alone, in the middle of its second iteration."""

    def on_experience(self, trainer, module, experience) -> None:
        if rank() == 1 and module.iteration == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def told_to_end(strategy: str, folder: Path) -> dict[str, Any]:
    """A run of which one process is told to end, the run that goes on from there, and one that was left alone."""

    def run(ckpt_path: Path | None = None, callbacks: Any = (), **flags: Any) -> dict[str, Any]:
        data = PromptDataModule(PROMPTS, batch_size=2, seed=3)
        return fit(online(PPOModule), data, strategy, ckpt_path, callbacks=callbacks, max_epochs=2, **flags)

    keep = ModelCheckpoint(folder, filename="kept", save_on_exception=True, every_n_epochs=100)
    try:
        run(callbacks=[keep, TellTheSecond()], enable_checkpointing=True)
    except SystemExit as error:
        said = type(error).__name__
    return {"said": said, "whole": run(), "rest": run(folder / "kept.ckpt")}


def evaluated(strategy: str, folder: Path) -> dict[str, Any]:
    """Seven prompts and texts, which two processes cannot share evenly: measured and answered, and in training too."""

    def measure(prompts, responses):
        measured.append(prompts)
        return {"of_b": [1.0 if "b" in response else None for response in responses], "rows": len(responses)}

    measured: list[list[str]] = []
    rows = PROMPTS[:7]
    size = 7 if strategy == "auto" else 4
    module = online(PPOModule, metric_fn=measure)
    data = PromptDataModule(PROMPTS, validation=rows, predict=rows, batch_size=per_process(8, strategy), seed=3)
    (before,) = trainer_of(strategy).validate(module, datamodule=data, verbose=False)
    (texts,) = trainer_of(strategy).test(module, DataLoader(rows, batch_size=size), verbose=False)
    writer = ResponseWriter(folder / "responses.jsonl")
    predicted = trainer_of(strategy, callbacks=[writer]).predict(module, datamodule=data)
    trainer = trainer_of(strategy, max_epochs=1)
    trainer.fit(module, datamodule=data)
    imitator = SFTModule(tiny_gpt2(LETTERS, layers=2, initializer_range=0.3), tokenizer=word_tokenizer(LETTERS), seed=8)
    imitated = ConversationDataModule(validation=[f"{row} a" for row in rows], batch_size=2)
    (losses,) = trainer_of(strategy).validate(imitator, datamodule=imitated, verbose=False)
    return {
        "before": before,
        "texts": {name.replace("test/", "val/"): value for name, value in texts.items()},
        "after": {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")},
        "losses": losses,
        "measured": sum(map(len, measured)),
        "predicted": [row["row"] for batch in predicted for row in batch],
        "written": (folder / "responses.jsonl").read_text(),
    }


def failing(kind: str, strategy: str, folder: Path) -> dict[str, Any]:
    """A reward that fails in the third iteration, on the second process only."""
    calls = []

    def judge(prompts, responses):
        calls.append(responses)
        scores = early_letters(prompts, responses)
        if len(calls) == 3 and rank() == 1:
            if kind == "raises":
                raise KeyError("answer")
            scores = scores[:-1] if kind == "too_few" else [scores[0], float("nan"), *scores[2:]]
        return scores

    keep = ModelCheckpoint(folder, filename="kept", every_n_train_steps=2, enable_version_counter=False)
    data = PromptDataModule(PROMPTS, batch_size=per_process(8, strategy), seed=3)
    trainer = trainer_of(strategy, callbacks=[keep], enable_checkpointing=True, max_epochs=5)
    try:
        trainer.fit(online(PPOModule, reward=judge), datamodule=data)
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    dist.barrier()
    module = online(PPOModule)
    trainer = trainer_of(strategy, max_epochs=3)
    trainer.fit(module, datamodule=PromptDataModule(PROMPTS, batch_size=4, seed=3), ckpt_path=folder / "kept.ckpt")
    return {
        "said": said,
        "second": calls[2][1],
        "left": sorted(p.name for p in folder.iterdir()),
        "done": module.iteration,
    }


failing_too_few = functools.partial(failing, "too_few")
failing_not_a_number = functools.partial(failing, "not_a_number")
failing_raises = functools.partial(failing, "raises")

SAME = [
    "ppo",
    "ppo_hydra",
    "ppo_loss",
    "ppo_lora",
    "grpo",
    "grpo_hydra",
    "grpo_silent",
    "ppo_t5",
    "ppo_branch",
    "ppo_t5_branch",
    "ppo_critic",
    "ppo_value_adapter",
    "ppo_recomputed",
    "ppo_reward_adapter",
    "grpo_t5_hydra",
    "ppo_named",
    "sft",
    "sft_streamed",
    "reward_model",
    "process_reward",
    "unlike_objects",
    "unlike_lengths",
    "unlike_passes",
    "uneven_rows",
]
"""Cases that come to the same on one process."""

OF_TWO = [
    "evaluated",
    "judged",
    "judged_whole",
    "filled_up",
    "plain_loader",
    "resumed",
    "resumed_whole",
    "resumed_grpo",
    "resumed_lora",
    "resumed_critic",
    "resumed_t5",
    "told_to_end",
    "failing_too_few",
    "failing_not_a_number",
    "failing_raises",
    "failing_beside",
    "failing_ties",
    "failing_endpoint",
]
"""Cases that only processes together have."""

ONLY = {
    "ddp": ["added_up", "eight_bit"],
    "rlhf_fsdp2": [
        "gathered",
        "in_step",
        "spread",
        "one_file",
        "exported",
        "exported_lora",
        "exported_t5",
        "eight_bit_refused",
    ],
}
"""Cases that only one strategy has."""
