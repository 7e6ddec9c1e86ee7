"""The memory of a run, part by part and phase by phase."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

from lightning_rlhf.generation.recorder import KEPT_BYTES
from lightning_rlhf.models.branches import ValueAdapter, ValueBranch
from lightning_rlhf.modules.base import RLHFModule
from lightning_rlhf.modules.critics import ActorCriticModule
from lightning_rlhf.modules.online import OnlineModule
from lightning_rlhf.planning import gathering
from lightning_rlhf.planning.networks import Networks
from lightning_rlhf.planning.paper import ACTIVATIONS, CACHE, GRADIENTS, LOGITS, PACKED
from lightning_rlhf.planning.passes import Passes, scored
from lightning_rlhf.planning.placement import Placement
from lightning_rlhf.planning.rows import Rows
from lightning_rlhf.planning.updates import optimizer_bytes

POLICY, VALUE, REFERENCE, REWARD = "policy", "values", "reference", "reward model"
OPTIMIZER, EXCHANGE, GATHERED, TRUNK = "optimizer", "exchange of gradients", "gathered weights", "kept trunk"
STANDING = (POLICY, VALUE, REFERENCE, REWARD, GRADIENTS, OPTIMIZER)
PARTS = (*STANDING, EXCHANGE, GATHERED, PACKED, TRUNK, CACHE, ACTIVATIONS, LOGITS)
"""What memory is for, in the order of the table."""
GENERATE, SCORE, BACKWARD, STEP = "generate", "score", "backward", "step"
"""Phases of an iteration, in their order; an offline module has the last two."""


@dataclass(frozen=True)
class Sizes:
    """How much a run reads and writes at a time, on each device.

    Attributes:
        batch: Prompts of an iteration; of an offline module rows of a batch.
        prompt: Tokens of the longest prompt; by default 512, or what the model has room for.
        response: Tokens of the longest response of an offline module; an online one says it itself.
        batch_tokens: Tokens of an offline module's batch, where they are counted instead of rows.
    """

    batch: int
    prompt: int | None = None
    response: int = 512
    batch_tokens: int | None = None


@dataclass(frozen=True)
class Plan:
    """Where the memory of a device goes.

    Attributes:
        bytes: By phase, then by part.
        facts: What the figures rest on, in sentences.
    """

    bytes: dict[str, Counter[str]]
    facts: list[str]

    @property
    def peak(self) -> str:
        """The phase that takes most."""
        return max(self.bytes, key=lambda phase: self.bytes[phase].total())

    @property
    def total(self) -> int:
        """The most bytes that a device holds at a time."""
        return self.bytes[self.peak].total()

    @classmethod
    def of(cls, module: RLHFModule, placement: Placement, sizes: Sizes) -> Plan:
        """Plans a run.

        Args:
            module: That has not built its networks.
            placement: Of the run.
            sizes: Of its batches.

        Returns:
            The plan.

        Raises:
            ValueError: If the run would be refused, or a config cannot be read.
        """
        networks = Networks.of(module, placement)
        batches = Batches.of(module, networks, sizes)
        held, at_once = standing(module, networks, placement)
        policy, learning = networks.policy, networks.learning
        held += Counter({EXCHANGE: gathering.exchanged(learning, placement) if placement.spread == "ddp" else 0})
        exchange = Counter({EXCHANGE: gathering.exchanged(learning, placement) if placement.is_sharded else 0})
        writing = Counter({GATHERED: gathering.while_writing(policy, placement)})
        running = Counter({GATHERED: gathering.while_running(learning, placement)})
        reading = _gathered_in_scoring(networks, placement)
        networks.compute_in(placement)

        passes = Passes(networks.mode, policy, placement, networks.critic)
        phases: dict[str, Counter[str]] = {}
        trunk: Counter[str] = Counter()
        if isinstance(module, OnlineModule):
            trunk = _trunk(passes, batches, module.trunk_gib)
            learnt = batches.micro.count * batches.micro.response
            rollout = passes.rollout(batches.prompts, module.responses_per_prompt, module.sampling, learnt)
            phases[GENERATE] = _without_gradients(held) + trunk + writing + rollout
            # What steps were recorded on stays on a GPU, unless it is large.
            held += Counter({CACHE: passes.recorded if passes.recorded <= KEPT_BYTES else 0})
            scoring = _scoring(module, networks, batches, passes, reading)
            phases[SCORE] = _without_gradients(held) + trunk + scoring
            trunk += Counter({TRUNK: passes.trunk_bytes(batches.minibatch) if trunk else 0})  # a copy, in pieces
        update = passes.update(batches.micro, *batches.finds_gradients(module, placement))
        before = held.copy()
        if placement.is_sharded:
            del update[GRADIENTS]  # as they are made; their parts are held
        else:
            del before[GRADIENTS]  # they come one by one, unless they were there before
        phases[BACKWARD] = before + trunk + running + exchange + update
        phases[STEP] = held + trunk + Counter({OPTIMIZER: at_once, LOGITS: passes.left})
        return cls(phases, batches.facts(module, networks))


def standing(module: RLHFModule, networks: Networks, placement: Placement) -> tuple[Counter[str], int]:
    """What is there from the first update on.

    Args:
        module: That has not built its networks.
        networks: Of the module, as they are held.
        placement: Of the run.

    Returns:
        Bytes by what they are for, and those that an optimizer's step takes beside them for a moment.
    """
    policy, critic = networks.policy, networks.critic
    state, at_once = optimizer_bytes(module, networks, placement)
    waits = isinstance(module, OnlineModule) and module.offload_frozen
    held = {
        POLICY: policy.bytes(placement),
        VALUE: policy.value_bytes(placement)
        + (0 if critic is None else critic.bytes(placement) + critic.value_bytes(placement)),
        REFERENCE: 0 if waits else networks.reference_bytes,
        REWARD: 0 if waits else sum(reward.bytes for reward in networks.rewards),
        GRADIENTS: sum(placement.bytes_of(network.trained) for network in networks.learning),
        OPTIMIZER: state,
    }
    return Counter(held), at_once


def _without_gradients(held: Counter[str]) -> Counter[str]:
    """What is there while responses are written and scored."""
    return Counter({part: size for part, size in held.items() if part != GRADIENTS})


def _gathered_in_scoring(networks: Networks, placement: Placement) -> dict[str, Counter[str]]:
    """What is whole while finished texts are read; what has read values stays whole in part until the backward pass.

    By what is read: values, reference, policy.
    """
    valuing, policy = networks.critic or networks.policy, networks.policy
    reads = networks.critic is not None or isinstance(policy.value, ValueBranch | ValueAdapter)
    left = gathering.whole(valuing.outside, placement) if reads else 0
    running = {
        VALUE: gathering.while_running([valuing], placement),
        REFERENCE: gathering.while_running([networks.reference or policy], placement) + left,
        POLICY: gathering.while_running([policy], placement) + (0 if valuing is policy else left),
    }
    return {part: Counter({GATHERED: size}) for part, size in running.items()}


def _scoring(
    module: OnlineModule, networks: Networks, batches: Batches, passes: Passes, gathered: dict[str, Counter[str]]
) -> Counter[str]:
    """What it takes, beside what is there anyhow, to read finished texts when that is most."""
    waits = module.offload_frozen
    rewards: Counter[str] = Counter()
    comparing: Counter[str] = Counter()
    for reward in networks.rewards:
        fetched = {REWARD: reward.bytes if waits else 0, GATHERED: reward.gathered}
        rewards = max(rewards, scored(networks.mode, reward, batches.texts) + Counter(fetched), key=Counter.total)
    if networks.form:
        reference = networks.reference
        comparer = passes if reference is None else Passes(networks.mode, reference, passes.placement)
        comparing = comparer.scoring(batches.micro) + gathered[REFERENCE]
        comparing[REFERENCE] += networks.reference_bytes if waits else 0
    found = [rewards + comparing] if module.reward_in_background else [rewards, comparing]
    if module.corrected.recomputes:
        found.append(passes.scoring(batches.micro) + gathered[POLICY])
    if isinstance(module, ActorCriticModule) and not module.sampler_keeps_values:
        found.append(passes.valuing(batches.valued) + gathered[VALUE])
    return max(found, key=Counter.total)


def _trunk(passes: Passes, batches: Batches, limit: float) -> Counter[str]:
    """What frozen blocks make of an iteration's texts, unless it takes too much memory."""
    size = passes.trunk_bytes(batches.texts)
    return Counter({TRUNK: size if size <= limit * 2**30 else 0})


@dataclass(frozen=True)
class Batches:
    """What the passes of a run read.

    Attributes:
        prompts: Of an iteration, to be answered.
        texts: All of an iteration.
        minibatch: Of an optimizer step.
        micro: Of a backward pass.
    """

    prompts: Rows
    texts: Rows
    minibatch: Rows
    micro: Rows

    @property
    def valued(self) -> Rows:
        """Of a pass over finished texts for values, which may read a token more: an end that was cut off."""
        return replace(self.micro, response=self.micro.response + 1)

    @classmethod
    def of(cls, module: RLHFModule, networks: Networks, sizes: Sizes) -> Batches:
        """Those of a module.

        Args:
            module: That says how it takes an iteration apart.
            networks: That limit how long a text may be.
            sizes: Of its data.

        Returns:
            The batches.

        Raises:
            ValueError: If a text would not fit into the model.
        """
        is_online = isinstance(module, OnlineModule)
        response = module.sampling.max_new_tokens if is_online else sizes.response
        rooms = [network.decoder.prompt_room(response) for network in networks.learning]
        room = min((room for room in rooms if room is not None), default=None)
        whose = "policy" if room == rooms[0] else "critic"
        prompt = sizes.prompt or (512 if room is None else max(1, min(512, room)))
        if room is not None and prompt > room:
            raise ValueError(
                f"`prompt_tokens={prompt}` and a response of {response} are more than the {whose}'s positions: "
                f"there is room for a prompt of {room}."
            )
        rows = Rows(sizes.batch, prompt, response)
        if not isinstance(module, OnlineModule):
            if sizes.batch_tokens is not None:
                rows = replace(rows, count=max(1, sizes.batch_tokens // (prompt + response)))
            return cls(rows, rows, rows, rows)
        texts = replace(rows, count=sizes.batch * module.responses_per_prompt)
        minibatch = replace(rows, count=min(module.minibatch_size, texts.count))
        count = module.micro_batch_size or minibatch.count
        if module.micro_batch_tokens is not None:
            count = max(1, module.micro_batch_tokens // (prompt + response))
        return cls(rows, texts, minibatch, replace(rows, count=min(count, minibatch.count)))

    def finds_gradients(self, module: RLHFModule, placement: Placement) -> tuple[bool, bool]:
        """Whether gradients of an earlier pass are there, in the forward and in the backward pass.

        Args:
            module: That trains.
            placement: Of the run.

        Returns:
            Both. By automatic optimisation Lightning drops gradients between the two.
        """
        if isinstance(module, OnlineModule):
            return (self.micro.count < self.minibatch.count,) * 2
        return True, placement.accumulates > 1

    def facts(self, module: RLHFModule, networks: Networks) -> list[str]:
        """What was assumed, in sentences.

        Args:
            module: That trains.
            networks: Of the run.

        Returns:
            The sentences.
        """
        micro, length = self.micro, f"{self.micro.prompt} + {self.micro.response} tokens"
        facts = [
            f"A backward pass: {micro.count} of {self.minibatch.count} rows, each of {length}, prompt and response."
        ]
        if isinstance(module, OnlineModule):
            facts.append(f"A rollout: {self.texts.count} responses to {self.prompts.count} prompts.")
            facts.append(f"Reference: {networks.form or 'none'}.")
            facts += [f"Values: {networks.values}."] if networks.values else []
            facts += [f"Reward model {reward.reward.name}: {reward.form}." for reward in networks.rewards]
            if module.offload_frozen:
                facts.append("Reference and reward models are on the device only while each of them is asked.")
        return facts
