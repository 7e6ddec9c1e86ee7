"""A plan counts what a module holds once it is built, and what its passes and updates hold once they run."""

import functools
import itertools
from dataclasses import replace

import bitsandbytes
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, GPT2ForSequenceClassification
from transformers.pytorch_utils import Conv1D

from lightning_rlhf import GRPOModule, ModelSpec, PPOModule, RewardModel, RewardModule
from lightning_rlhf.batches import ImitationBatch
from lightning_rlhf.functional import linear, spare
from lightning_rlhf.generation import recorder
from lightning_rlhf.generation.sampling import draw
from lightning_rlhf.models.adapters import VALUE as VALUE_ADAPTER
from lightning_rlhf.modules.optimization import make_optimizer
from lightning_rlhf.planning import paper
from lightning_rlhf.planning import plan as planning
from lightning_rlhf.planning.gathering import exchanged, while_writing
from lightning_rlhf.planning.live import Live
from lightning_rlhf.planning.networks import Networks
from lightning_rlhf.planning.paper import ACTIVATIONS, CACHE, GRADIENTS, LOGITS, PACKED
from lightning_rlhf.planning.passes import Passes
from lightning_rlhf.planning.placement import Placement
from lightning_rlhf.planning.plan import (
    BACKWARD,
    EXCHANGE,
    GATHERED,
    GENERATE,
    OPTIMIZER,
    POLICY,
    REFERENCE,
    REWARD,
    SCORE,
    STEP,
    TRUNK,
    VALUE,
    Plan,
    Sizes,
    standing,
)
from lightning_rlhf.planning.rows import Rows
from tests.networks import ARCHITECTURES, ENCODER_DECODERS, VOCABULARY, deep, network, tiny_gpt2, word_tokenizer
from tests.training import module_of, sft

ONE = Placement(is_gpu=False)
SIZES = Sizes(batch=3, prompt=5)
LORA = {"peft_type": "LORA", "r": 2, "target_modules": "all-linear"}
SLOW = pytest.mark.slow
SOME = (
    "gpt2",
    "opt",
    "llama",
    *(pytest.param(name, marks=SLOW) for name in ("gpt_neox", "gptj", "qwen3", "gemma", "bloom")),
)
"""Absolute and rotary positions, heads with weights of their own and not; the others are like one of these."""


def size(tensors):
    return sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors}.values())


def everything(module):
    return [*module.parameters(), *module.buffers()]


def build(module):
    module.configure_model()
    return module


def optimizer_of(module):
    embeddings = [p for part in module.modules() if isinstance(part, torch.nn.Embedding) for p in part.parameters()]
    return make_optimizer(module.optimizer, module.parameter_groups(), embeddings)


def check_against_built(module, placement=ONE):
    """The standing parts of a plan are those of the module once it is built, and of its optimizer after a step."""
    held, _ = standing(module, Networks.of(module, placement), placement)
    policy = build(module).policy
    reference = module.reference
    trained = [p for p in module.parameters() if p.requires_grad]
    own = (
        set() if policy.decoder.adapters is None else {id(p) for p in policy.decoder.adapters.parameters(VALUE_ADAPTER)}
    )
    assert held[POLICY] == size([t for t in everything(policy.decoder) if id(t) not in own])
    assert held[POLICY] + held[VALUE] == size(everything(module))
    assert held[GRADIENTS] == size(trained)
    copies = [] if reference is None else list(reference.network.parameters())
    shared = {id(t) for t in everything(policy)}
    buffers = [] if reference is None else list(reference.network.buffers())
    assert held[REFERENCE] == size([t for t in [*copies, *buffers] if id(t) not in shared])
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer = optimizer_of(module)
    optimizer.step()
    state = [
        value for values in optimizer.state.values() for value in values.values() if isinstance(value, torch.Tensor)
    ]
    assert held[OPTIMIZER] == pytest.approx(size(state), abs=0.01 * size(state))
    return held


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("layers", [-1, 1])
def test_weights_gradients_reference_and_state_are_those_of_the_module_that_is_built(name, layers):
    spec = ModelSpec(deep(name), num_layers_unfrozen=layers)
    check_against_built(module_of(PPOModule, spec, optimizer=None))


@pytest.mark.parametrize("name", ["t5", "bart"])
@pytest.mark.parametrize("layers", [-1, 1])
def test_so_are_those_of_encoder_decoders(name, layers):
    spec = ModelSpec(ENCODER_DECODERS[name](), num_layers_unfrozen=layers)
    check_against_built(module_of(PPOModule, spec, optimizer=None))


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
def test_an_adapter_trains_alone_and_its_reference_takes_nothing(name):
    config = {**ARCHITECTURES, **ENCODER_DECODERS}[name]()
    held = check_against_built(module_of(PPOModule, ModelSpec(config, adapter=LORA), optimizer=None))
    assert held[REFERENCE] == 0
    assert held[GRADIENTS] < held[POLICY] / 2


VALUES = {
    "linear": {"value_head": "linear"},
    "branch": {"num_value_layers_unfrozen": 1},
    "copy": {"critic": "policy"},
}
"""What says values of a policy whose weights train."""


@pytest.mark.parametrize(("name", "layers"), [("gpt2", 1), pytest.param("gpt_neox", -1, marks=SLOW), ("t5", 1)])
@pytest.mark.parametrize("says", VALUES)
def test_what_says_values_is_counted_as_it_is_built(name, layers, says):
    config = deep(name) if name in ARCHITECTURES else ENCODER_DECODERS[name]()
    module = module_of(PPOModule, ModelSpec(config, num_layers_unfrozen=layers), optimizer=None, **VALUES[says])
    held = check_against_built(module)
    assert held[VALUE] > 0


@pytest.mark.parametrize("name", ["gpt2", pytest.param("t5", marks=SLOW)])
@pytest.mark.parametrize("more", [{"critic": "policy"}, {"num_value_layers_unfrozen": 1}])
def test_so_is_what_says_values_beside_an_adapter(name, more):
    config = {**ARCHITECTURES, **ENCODER_DECODERS}[name]()
    held = check_against_built(module_of(PPOModule, ModelSpec(config, adapter=LORA), optimizer=None, **more))
    assert held[REFERENCE] == 0
    assert held[VALUE] > 0
    assert ("num_value_layers_unfrozen" in more) == (held[VALUE] > held[POLICY] / 4)


def saved(folder, model):
    model.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return str(folder)


def test_a_critic_of_another_model_counts_by_itself(tmp_path):
    folder = saved(tmp_path, network(tiny_gpt2(width=8, layers=3)))
    critic = ModelSpec(folder, num_layers_unfrozen=2)
    held = check_against_built(module_of(PPOModule, critic=critic, optimizer=None))
    assert held[GRADIENTS] < held[POLICY] + held[VALUE]


def test_so_does_one_that_is_a_classifier_and_its_head(tmp_path):
    config = tiny_gpt2(width=8, num_labels=1)
    folder = saved(tmp_path / "one", GPT2ForSequenceClassification(config))
    check_against_built(module_of(PPOModule, critic=folder, optimizer=None))
    config.num_labels = 2
    folder = saved(tmp_path / "two", GPT2ForSequenceClassification(config))
    with pytest.raises(ValueError, match="has 2 labels, of which none is a value"):
        Plan.of(module_of(PPOModule, critic=folder), ONE, SIZES)
    check_against_built(module_of(PPOModule, critic=folder, value_head="mlp", optimizer=None))


def test_nothing_is_compared_where_divergence_has_no_price():
    assert check_against_built(module_of(GRPOModule, tiny_gpt2(), kl_coef=0.0, group_size=2))[REFERENCE] == 0


def test_a_named_reference_and_a_reward_model_count_by_themselves(tmp_path):
    small = tiny_gpt2(width=8)
    network(small).save_pretrained(tmp_path / "reference")
    bert = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        num_labels=1,
    )
    classifier = BertForSequenceClassification(bert)
    classifier.save_pretrained(tmp_path / "reward")
    for folder in ("reference", "reward"):
        word_tokenizer().save_pretrained(tmp_path / folder)
    rewards = [RewardModel(tmp_path / "reward"), RewardModel(tmp_path / "reward", device="cpu", name="elsewhere")]
    module = module_of(PPOModule, reference=str(tmp_path / "reference"), reward=rewards)
    plan = Plan.of(module, ONE, SIZES)
    assert plan.bytes[STEP][REWARD] == size(everything(classifier))
    assert plan.bytes[STEP][REFERENCE] == size(everything(network(small)))
    assert plan.bytes[SCORE][ACTIVATIONS] > 0


@pytest.mark.parametrize("quantization", ["nf4", "nf4-dq", "int8"])
def test_rounded_weights_take_what_bitsandbytes_makes_of_them(quantization, tmp_path):
    config = ARCHITECTURES["llama"](hidden_size=64, intermediate_size=128)
    network(config).save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    spec = ModelSpec(tmp_path, quantization=quantization, adapter=LORA)
    module = module_of(PPOModule, spec, tokenizer=None)
    planned = Plan.of(module, ONE, SIZES).bytes[STEP]
    build(module)
    held = 0
    for parameter in module.policy.decoder.parameters():
        held += parameter.numel() * parameter.element_size()
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            held += size([state.absmax]) + (size([state.state2.absmax]) if state.nested else 0)
    for layer in module.policy.decoder.modules():
        if hasattr(layer, "state"):
            scales = layer.weight.SCB if layer.state.SCB is None else layer.state.SCB
            held += size([scales])
    assert planned[POLICY] == pytest.approx(held + size(module.policy.decoder.buffers()), rel=0.01)
    trained = [p for p in module.policy.parameters() if p.requires_grad]
    assert planned[GRADIENTS] == size(trained)


def test_eight_bit_state_and_a_step_on_a_cpu_are_what_bitsandbytes_makes():
    module = module_of(
        PPOModule, tiny_gpt2(width=64), optimizer=functools.partial(bitsandbytes.optim.AdamW8bit, lr=1e-3)
    )
    (planned, at_once), (_, on_gpu) = (
        standing(module, Networks.of(module, placement), placement) for placement in (ONE, Placement())
    )
    optimizer = optimizer_of(build(module))
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    names = ("state1", "state2", "absmax1", "absmax2")
    state = [values[name] for values in optimizer.state.values() for name in names if name in values]
    assert planned[OPTIMIZER] == pytest.approx(size(state), rel=0.01)
    assert any(tensor.dtype == torch.uint8 for tensor in state)
    assert at_once == pytest.approx(allocated(optimizer.step), rel=0.05)
    assert on_gpu == 0


def allocated(run):
    """The most that something allocates at a time, as torch's profiler sees it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


# --- passes -----------------------------------------------------------------------------------------------------------


def batch_of(rows, prompt, response):
    def tokens(width):
        return torch.arange(rows * width).view(rows, width) % VOCABULARY

    prompts, responses = tokens(prompt), tokens(response)
    is_prompt = torch.ones_like(prompts, dtype=torch.bool)
    is_prompt[0, 0] = False  # without any padding there is no mask either
    return ImitationBatch(
        prompt_tokens=prompts,
        prompt_mask=is_prompt,
        response_tokens=responses,
        response_mask=torch.ones_like(responses, dtype=torch.bool),
    )


def real_pass(module, rows):
    """The peak of a pass of the module itself, with numbers."""
    policy = build(module).policy.train()
    batch = batch_of(rows.count, rows.prompt, rows.response)
    with Live("all") as live:
        live.ignore(everything(module))
        output = policy(batch)
        values = output.values if module.critic is None else module.critic(batch)
        loss = output.logprobs.sum() + (0 if values is None else values.sum())
        del output, values
        loss.backward()
    return live.peak.total()


def planned_pass(module, rows):
    """The peak of the same pass in a plan."""
    networks = Networks.of(module, ONE)
    passes = Passes(networks.mode, networks.policy, ONE, networks.critic)
    return passes.update(rows, in_forward=False, in_backward=False)


WAYS = {
    "full": {},
    "top": {"num_layers_unfrozen": 1},
    "lora": {"adapter": LORA},
    "again": {"gradient_checkpointing": True},
}
SLOWER = [("t5", way) for way in WAYS if way != "full"]
SLOWER += [("bart", "lora"), ("gpt_neox", "again"), ("opt", "lora"), ("gemma", "top")]


# Every way of training on one architecture of either kind, and every other architecture in one of the ways.
@pytest.mark.parametrize(
    ("name", "way"),
    [
        *(("gpt2", way) for way in WAYS),
        ("t5", "full"),
        ("llama", "top"),
        ("gemma2", "full"),
        *(pytest.param(*case, marks=SLOW) for case in SLOWER),
    ],
)
def test_a_training_pass_holds_what_it_does_with_numbers(name, way):
    build_config = deep if name in ARCHITECTURES else lambda name: ENCODER_DECODERS[name]()
    rows = Rows(count=6, prompt=20, response=24)
    module = module_of(PPOModule, ModelSpec(build_config(name), **WAYS[way]))
    planned = planned_pass(module, rows)
    assert planned.total() == pytest.approx(real_pass(module, rows), rel=0.08)
    assert planned[ACTIVATIONS] > 0


BRANCH, CRITIC = {"num_value_layers_unfrozen": 1}, {"critic": "policy"}


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("gpt2", BRANCH),
        ("gpt2", CRITIC),
        ("gpt2", {**CRITIC, "adapter": LORA}),
        ("gpt2", {**BRANCH, "adapter": LORA, "gradient_checkpointing": True}),
        ("t5", BRANCH),
        pytest.param("t5", {**CRITIC, "adapter": LORA}, marks=SLOW),
    ],
)
def test_a_training_pass_with_values_of_their_own_does_too(name, more):
    config = deep(name) if name in ARCHITECTURES else ENCODER_DECODERS[name]()
    rows = Rows(count=6, prompt=20, response=24)
    says = {key: value for key, value in more.items() if key in ("critic", "num_value_layers_unfrozen")}
    spec = ModelSpec(config, **{key: value for key, value in more.items() if key not in says})
    module = module_of(PPOModule, spec, **says)
    planned = planned_pass(module, rows)
    assert planned.total() == pytest.approx(real_pass(module, rows), rel=0.08)


@pytest.mark.parametrize("more", [{"num_value_layers_unfrozen": 1}, {"critic": "policy"}])
def test_finished_texts_are_read_for_values(more):
    module = module_of(PPOModule, tiny_gpt2(), kl_coef=0.0, **more)
    score = Plan.of(module, ONE, SIZES).bytes[SCORE]
    batch = batch_of(3, 5, 7)
    critic = (build(module).critic or module.policy).eval()
    with torch.no_grad(), Live("all") as live:
        live.ignore(everything(module))
        critic.values(batch) if module.critic is None else critic(batch)
    assert score[ACTIVATIONS] == pytest.approx(live.peak.total(), rel=0.05)


def test_texts_are_read_again_where_that_is_asked_for():
    def read(**more):
        return Plan.of(module_of(PPOModule, tiny_gpt2(), kl_coef=0.0, **more), ONE, SIZES).bytes[SCORE][ACTIVATIONS]

    assert read(recompute_logprobs=True) > read() == 0


def test_gradients_that_are_there_already_come_on_top():
    rows = Rows(count=2, prompt=8, response=8)

    @functools.cache
    def peak(in_forward, in_backward):
        networks = Networks.of(module_of(PPOModule), ONE)
        return Passes(networks.mode, networks.policy, ONE).update(rows, in_forward, in_backward)

    whole = size(p for p in build(module_of(PPOModule)).policy.parameters())
    assert peak(True, True)[GRADIENTS] >= whole
    assert peak(False, False)[GRADIENTS] < whole
    assert peak(True, True).total() > peak(True, False).total() > peak(False, False).total()


def test_activations_computed_again_are_not_held():
    rows = Rows(count=8, prompt=20, response=20)

    def activations(recomputes):
        spec = ModelSpec(tiny_gpt2(layers=6), gradient_checkpointing=recomputes)
        networks = Networks.of(module_of(PPOModule, spec), ONE)
        return Passes(networks.mode, networks.policy, ONE).update(rows, False, False)[ACTIVATIONS]

    assert activations(True) < 0.5 * activations(False)


READING, WRITING, DRAWING = (40, 1, VOCABULARY), (10, 3, VOCABULARY), (10, 3, 4000)
"""What takes most, by the length of prompts, responses to each, and entries of the vocabulary."""


@pytest.mark.parametrize(
    ("name", "most"),
    [
        *(("gpt2", most) for most in (READING, WRITING, DRAWING)),
        *(("t5", most) for most in (READING, WRITING)),
        *(pytest.param(name, most, marks=SLOW) for name in ("llama", "qwen3") for most in (READING, WRITING)),
    ],
)
def test_the_cache_is_as_long_as_it_gets_and_a_rollout_takes_what_it_does_with_numbers(name, most):
    prompt, group, vocabulary = most
    config = {**ARCHITECTURES, **ENCODER_DECODERS}[name](vocab_size=vocabulary)
    module = module_of(GRPOModule, config, sampling={"max_new_tokens": 9}, group_size=max(2, group))
    networks = Networks.of(module, ONE)
    rows = Rows(count=2, prompt=prompt, response=9)
    found = Passes(networks.mode, networks.policy, ONE).rollout(rows, group, module.sampling)
    policy = build(module).policy.eval()
    with torch.no_grad(), Live("all") as live:
        live.ignore(everything(module))
        mask = torch.ones(2, prompt, dtype=torch.bool)
        mask[0, 0] = False
        tokens, mask, cache = policy.begin(torch.zeros(2, prompt, dtype=torch.long), mask)
        step = policy.next_token(tokens, mask, cache).repeated(group)
        mask = mask.repeat_interleave(group, 0)
        for _ in range(8):
            token, *_ = draw(step.logits, torch.zeros(2 * group), module.sampling)
            mask = torch.cat([mask, torch.ones(2 * group, 1, dtype=torch.bool)], dim=1)
            step = policy.next_token(token[:, None], mask, step.cache)
    assert found.total() == pytest.approx(live.peak.total(), rel=0.05)
    if most != READING:
        assert found[CACHE] == held_by(step.cache)


def held_by(cache):
    """Bytes of the storages of a cache."""
    past = getattr(cache, "past", cache)
    halves = (getattr(past, "self_attention_cache", past), getattr(past, "cross_attention_cache", None))
    tensors = [
        value for half in halves if half is not None for layer in half.layers for value in (layer.keys, layer.values)
    ]
    tensors += [cache.states] if hasattr(cache, "states") else []
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


# --- how it is put together -------------------------------------------------------------------------------------------


def test_phases_hold_what_is_there_in_them():
    spec, optimizer = ModelSpec(deep("gpt2"), num_layers_unfrozen=1), functools.partial(torch.optim.AdamW, lr=1e-3)
    module = module_of(PPOModule, spec, micro_batch_size=1, minibatch_size=2, optimizer=optimizer)
    plan = Plan.of(module, ONE, SIZES)
    assert list(plan.bytes) == [GENERATE, SCORE, BACKWARD, STEP]
    assert plan.total == max(held.total() for held in plan.bytes.values()) == plan.bytes[plan.peak].total()
    for part in (POLICY, VALUE, REFERENCE, OPTIMIZER):
        assert len({held[part] for phase, held in plan.bytes.items() if (part, phase) != (OPTIMIZER, STEP)}) == 1
    at_once = plan.bytes[STEP][OPTIMIZER] - plan.bytes[BACKWARD][OPTIMIZER]
    assert at_once == standing(module, Networks.of(module, ONE), ONE)[1] > 0
    assert plan.bytes[GENERATE][CACHE] > 0
    assert plan.bytes[BACKWARD][CACHE] == 0
    # Three texts of 5 + 6 - 1 positions and 16 channels, and a copy of the minibatch's two.
    assert plan.bytes[GENERATE][TRUNK] == 3 * 10 * 16 * 4
    assert plan.bytes[BACKWARD][TRUNK] == 5 * 10 * 16 * 4
    # Those of the first micro-batch, and those of the second as they are made.
    trained = plan.bytes[STEP][GRADIENTS]
    assert trained <= plan.bytes[BACKWARD][GRADIENTS] < 2 * trained
    module.trunk_gib = 0.0
    assert Plan.of(module, ONE, SIZES).bytes[GENERATE][TRUNK] == 0


def test_on_a_gpu_the_cache_that_steps_are_recorded_on_stays(monkeypatch):
    def held(placement, policy=None, **sampling):
        sampling = {"max_new_tokens": recorder.FEWEST, **sampling}
        return Plan.of(module_of(PPOModule, policy, sampling=sampling, optimizer=None), placement, SIZES).bytes

    phases = held(Placement())
    # Keys and values, two blocks, three rows, 64 columns for 5 + 16 tokens, 16 channels; and while one is filled, those
    # of the prompt's 5 tokens.
    kept, prompt = (2 * 2 * 3 * columns * 16 * 4 for columns in (64, 5))
    assert phases[SCORE][CACHE] == phases[BACKWARD][CACHE] == phases[STEP][CACHE] == kept
    assert phases[GENERATE][CACHE] == kept + prompt
    for others in (
        held(ONE),
        held(Placement(4, "sharded")),
        held(Placement(), max_new_tokens=recorder.FEWEST - 1),
        held(Placement(), ARCHITECTURES["mistral"]()),  # what falls out of a window is not kept
        held(Placement(), ENCODER_DECODERS["t5"]()),
    ):
        assert others[SCORE][CACHE] == others[STEP][CACHE] == 0
    monkeypatch.setattr(planning, "KEPT_BYTES", kept - 1)
    assert held(Placement())[STEP][CACHE] == 0


@pytest.mark.parametrize("way", ["full", "top"])
def test_exponentials_that_a_pass_leaves_to_the_next_are_there_until_then(way, monkeypatch):
    for module in (spare, paper):
        monkeypatch.setattr(module, "SMALLEST", 0)
    rows = Rows(3, 5, 7)
    made = module_of(PPOModule, ModelSpec(deep("gpt2"), **WAYS[way]), optimizer=None)
    planned = planned_pass(made, rows)
    assert planned.total() == pytest.approx(real_pass(made, rows), rel=0.02)
    exponentials = 3 * 7 * VOCABULARY * 4
    monkeypatch.setattr(paper, "SMALLEST", exponentials)
    left = Plan.of(made, ONE, replace(SIZES, batch=1)).bytes[STEP][LOGITS]
    assert left == 0, "too little to be kept"
    monkeypatch.setattr(paper, "SMALLEST", 0)
    response = made.sampling.max_new_tokens
    assert Plan.of(made, ONE, replace(SIZES, batch=1)).bytes[STEP][LOGITS] == response * VOCABULARY * 4
    assert Plan.of(made, replace(ONE, is_gpu=True), replace(SIZES, batch=1)).bytes[STEP][LOGITS] == 0


def test_copies_that_are_packed_for_a_cpu_take_the_place_of_gradients(monkeypatch):
    monkeypatch.setattr(linear, "SMALLEST", 0)

    def held(placement=ONE, most=recorder.FEWEST, **spec):
        spec = ModelSpec(deep("gpt2"), **spec)
        return Plan.of(module_of(PPOModule, spec, sampling={"max_new_tokens": most}, optimizer=None), placement, SIZES)

    plan = held()
    assert plan.bytes[GENERATE][GRADIENTS] == plan.bytes[SCORE][GRADIENTS] == 0
    assert plan.bytes[STEP][GRADIENTS] > 0
    module = build(module_of(PPOModule, deep("gpt2"), optimizer=None))
    model = module.policy.decoder.model
    layers = [layer for layer in model.modules() if isinstance(layer, torch.nn.Linear | Conv1D)]
    assert plan.bytes[GENERATE][PACKED] == size([layer.weight for layer in layers])
    made = module_of(PPOModule, ModelSpec(deep("gpt2"), num_layers_unfrozen=1), optimizer=None)
    top = [p for p in build(made).policy.decoder.model.parameters() if p.requires_grad]
    exponentials = SIZES.batch * recorder.FEWEST * VOCABULARY * 4
    copies = held(num_layers_unfrozen=1).bytes[GENERATE][PACKED]
    assert 0 < copies < plan.bytes[GENERATE][PACKED]
    assert copies <= size(top) + exponentials
    for other in (
        held(replace(ONE, is_gpu=True)),
        held(Placement(2, "sharded", is_gpu=False)),
        held(replace(ONE, precision="bf16-mixed")),
        held(replace(ONE, precision="bf16-true")),
        held(most=recorder.FEWEST - 1),
    ):
        assert other.bytes[GENERATE][PACKED] == 0
    monkeypatch.undo()
    assert held().bytes[GENERATE][PACKED] == 0, "too small to be worth it"


def test_an_offline_module_only_learns():
    plan = Plan.of(sft(optimizer=None), ONE, Sizes(batch=4, prompt=5, response=7))
    assert list(plan.bytes) == [BACKWARD, STEP]
    by_tokens = Plan.of(sft(optimizer=None), ONE, Sizes(batch=1, prompt=5, response=7, batch_tokens=4 * 12))
    assert by_tokens.bytes[BACKWARD] == plan.bytes[BACKWARD]
    added = Plan.of(sft(optimizer=None), replace(ONE, accumulates=2), Sizes(batch=4, prompt=5, response=7))
    assert added.bytes[BACKWARD][GRADIENTS] > plan.bytes[BACKWARD][GRADIENTS]


@functools.cache
def tiny(placement, says="nothing"):
    """What a plan says of PPO on a tiny model."""
    module = module_of(PPOModule, tiny_gpt2(), optimizer=None, **VALUES.get(says, {}))
    return Plan.of(module, placement, SIZES).bytes


DDP, SHARDED = Placement(4, "ddp", is_gpu=False), Placement(4, "sharded", is_gpu=False)


def test_every_device_has_everything_under_ddp_and_a_part_when_sharded():
    one, ddp, sharded = tiny(ONE), tiny(DDP), tiny(SHARDED)
    parameters = list(build(module_of(PPOModule, tiny_gpt2())).policy.decoder.parameters())
    buffers = list(build(module_of(PPOModule, tiny_gpt2())).policy.decoder.buffers())
    parts = sum(-(-len(p) // 4) * p[0].numel() * 4 for p in parameters)
    assert ddp[STEP][EXCHANGE] == one[STEP][GRADIENTS]
    assert {part: n for part, n in ddp[STEP].items() if part != EXCHANGE} == dict(one[STEP])
    assert sharded[STEP][POLICY] == parts + size(buffers)
    assert sharded[STEP][OPTIMIZER] == pytest.approx(one[STEP][OPTIMIZER] / 4, rel=0.1)
    assert sharded[GENERATE][GATHERED] == size(build(module_of(PPOModule, tiny_gpt2())).policy.parameters())
    assert 0 < sharded[BACKWARD][GATHERED] < 2 * sharded[GENERATE][GATHERED]


@pytest.mark.parametrize("rows", [3, 8, 10])
def test_a_device_holds_the_largest_part(rows):
    """Of what does not come out even, the first does."""
    assert SHARDED.part((rows, 5)) == torch.empty(rows, 5).chunk(4)[0].shape


def test_weights_that_are_left_in_shards_are_gathered_block_by_block_while_they_write():
    policy = Networks.of(module_of(PPOModule, tiny_gpt2(layers=8), optimizer=None), SHARDED).policy
    own = list(build(module_of(PPOModule, tiny_gpt2(layers=8))).policy.named_parameters())
    block = size(p for name, p in own if ".h.0." in name)
    root = size(p for name, p in own if ".h." not in name)
    assert while_writing(policy, SHARDED) == root + 8 * block
    assert while_writing(policy, replace(SHARDED, holds_weights=False)) == root + max(root, 3 * block)
    assert while_writing(policy, replace(DDP, holds_weights=False)) == 0


def test_gradients_of_a_block_are_exchanged_at_a_time_in_the_type_in_which_they_are_added_up():
    learning = Networks.of(module_of(PPOModule, tiny_gpt2(layers=8)), SHARDED).learning
    own = list(build(module_of(PPOModule, tiny_gpt2(layers=8))).policy.named_parameters())
    block = sum(p.numel() for name, p in own if ".h.0." in name)
    root = sum(p.numel() for name, p in own if ".h." not in name)
    assert exchanged(learning, SHARDED) == 4 * root + max(4 * root, 8 * block)
    assert exchanged(learning, replace(SHARDED, precision="bf16-mixed")) == 2 * root + max(4 * root, 6 * block)


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_a_trunk_is_as_wide_as_the_one_that_is_kept(name):
    module = module_of(PPOModule, ModelSpec({**ARCHITECTURES, **ENCODER_DECODERS}[name](), num_layers_unfrozen=1))
    networks = Networks.of(module, ONE)
    planned = Passes(networks.mode, networks.policy, ONE).trunk_bytes(Rows(count=2, prompt=5, response=7))
    policy = build(module).policy.eval()
    prompts = torch.zeros(2, 5, dtype=torch.long), torch.ones(2, 5, dtype=torch.bool)
    with torch.no_grad():
        read = policy.next_token(*policy.begin(*prompts)).trunk
    assert planned == 2 * (read.shape[1] + 7 - 1) * size([read[0, 0]])


def test_an_optimizer_that_takes_all_parameters_at_once_takes_more():
    """As torch's do on a GPU."""
    module = module_of(PPOModule, optimizer=functools.partial(torch.optim.AdamW, lr=1e-3))
    one, gpu = (standing(module, Networks.of(module, placement), placement)[1] for placement in (ONE, Placement()))
    groups = [size(group["params"]) for group in build(module).parameter_groups()]
    assert 0 < one < max(groups) / 2
    assert gpu == pytest.approx(max(groups), rel=0.05)


def test_half_precision_halves_what_it_is_of():
    def held(precision, **more):
        module, placement = module_of(PPOModule, tiny_gpt2(width=64)), Placement(precision=precision, **more)
        networks = Networks.of(module, placement)
        sizes, _ = standing(module, networks, placement)
        networks.compute_in(placement)
        return {**sizes, GATHERED: while_writing(networks.policy, placement)}

    single, half, mixed = held("32-true"), held("bf16-true"), held("bf16-mixed")
    buffers = size(build(module_of(PPOModule, tiny_gpt2(width=64))).policy.decoder.buffers())
    assert half[POLICY] - buffers == (single[POLICY] - buffers) // 2
    assert half[GRADIENTS] == single[GRADIENTS] // 2
    assert mixed[POLICY] == single[POLICY]
    whole, gathered = (
        held(precision, devices=2, spread="sharded")[GATHERED] for precision in ("32-true", "bf16-mixed")
    )
    assert gathered == whole // 2 > 0


def test_a_critic_is_spread_as_the_policy_is():
    assert tiny(DDP, "copy")[STEP][EXCHANGE] == tiny(ONE, "copy")[STEP][GRADIENTS]
    for says in ("branch", "copy"):
        one, parts = tiny(ONE, says), tiny(SHARDED, says)
        for part in (VALUE, GRADIENTS, OPTIMIZER):
            assert parts[STEP][part] == pytest.approx(one[STEP][part] / 4, rel=0.2)
    alone, critic, branch = (tiny(SHARDED, says) for says in ("nothing", "copy", "branch"))
    assert critic[GENERATE][GATHERED] < alone[GENERATE][GATHERED] < branch[GENERATE][GATHERED]
    for part in (GATHERED, EXCHANGE):
        assert critic[BACKWARD][part] > alone[BACKWARD][part]
    assert critic[SCORE][GATHERED] > alone[SCORE][GATHERED]


def with_classifier(tmp_path, **more):
    config = tiny_gpt2(width=32, layers=4, num_labels=1)
    folder = saved(tmp_path, GPT2ForSequenceClassification(config))
    return lambda **arguments: module_of(PPOModule, reward=RewardModel(folder, **more), **arguments)


def test_a_reward_model_is_sharded_where_the_policy_is(tmp_path):
    sharded = Placement(4, "sharded", is_gpu=False)
    whole = Plan.of(with_classifier(tmp_path)(), ONE, SIZES)
    part = Plan.of(with_classifier(tmp_path)(), sharded, SIZES)
    apart = Plan.of(with_classifier(tmp_path, sharded=False)(), sharded, SIZES)
    model = GPT2ForSequenceClassification.from_pretrained(tmp_path)
    assert part.bytes[STEP][REWARD] == sum(-(-len(p) // 4) * size([p[0]]) for p in model.parameters())
    assert apart.bytes[STEP][REWARD] == whole.bytes[STEP][REWARD] == size(everything(model))
    one_by_one = Plan.of(with_classifier(tmp_path, batch_tokens=1)(kl_coef=0.0), ONE, SIZES)
    together = Plan.of(with_classifier(tmp_path)(kl_coef=0.0), ONE, SIZES)
    assert one_by_one.bytes[SCORE][ACTIVATIONS] < together.bytes[SCORE][ACTIVATIONS] / 2
    root = size([*model.transformer.wte.parameters(), *model.transformer.wpe.parameters()])
    root += size([*model.transformer.ln_f.parameters(), *model.score.parameters()])
    gathered = Networks.of(with_classifier(tmp_path)(), sharded).rewards[0].gathered
    assert gathered == root + max(root, 3 * size(model.transformer.h[0].parameters()))
    assert any("a part on each device" in fact for fact in part.facts)
    assert any("whole on each device" in fact for fact in apart.facts)
    with pytest.raises(ValueError, match="`reward_in_background=True`: the reward model"):
        Plan.of(with_classifier(tmp_path)(reward_in_background=True), sharded, SIZES)


def test_a_reward_that_is_an_adapter_takes_its_own_weights_alone(tmp_path):
    base = saved(tmp_path / "base", network(tiny_gpt2()))
    judge = RewardModule(ModelSpec(base, adapter={**LORA, "target_modules": ["c_attn"]}))
    judge.save_pretrained(tmp_path / "judge", merge_adapter=False)
    own = size(p for name, p in judge.policy.named_parameters() if "lora_" in name)
    for placement in (ONE, Placement(2, "sharded", is_gpu=False)):
        plan = Plan.of(module_of(PPOModule, ModelSpec(base, adapter=LORA), reward=tmp_path / "judge"), placement, SIZES)
        assert plan.bytes[STEP][REWARD] == own / placement.devices
        assert any("an adapter on the policy's model" in fact for fact in plan.facts)


def test_networks_that_wait_in_host_memory_are_there_while_they_are_asked(tmp_path):
    there, waits, both = (
        Plan.of(with_classifier(tmp_path)(**more), ONE, SIZES)
        for more in ({}, {"offload_frozen": True}, {"offload_frozen": True, "reward_in_background": True})
    )
    for part in (REWARD, REFERENCE):
        assert there.bytes[STEP][part] == there.bytes[GENERATE][part] == both.bytes[SCORE][part] > 0
        assert waits.bytes[STEP][part] == waits.bytes[GENERATE][part] == waits.bytes[BACKWARD][part] == 0
    assert waits.bytes[SCORE][REWARD] == there.bytes[SCORE][REWARD]
    assert waits.bytes[SCORE][REFERENCE] == 0  # smaller, and asked by itself
    assert any("only while" in fact for fact in waits.facts)
    with pytest.raises(ValueError, match="`offload_frozen=True`: sharded weights stay where they are"):
        Plan.of(with_classifier(tmp_path)(offload_frozen=True), Placement(2, "sharded"), SIZES)


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        ({"devices": "auto"}, "`trainer.devices='auto'` does not say how many"),
        ({"devices": -1}, "`trainer.devices=-1` does not say how many"),
        ({"devices": 2, "strategy": "fsdp"}, "is FSDP1"),
        ({"devices": 2, "strategy": {"class_path": "lightning.pytorch.strategies.FSDPStrategy"}}, "is FSDP1"),
        ({"devices": 2, "strategy": "deepspeed"}, "`trainer.strategy='deepspeed'` cannot be planned: use 'auto'"),
        ({"devices": 1, "precision": "nf4"}, "`trainer.precision='nf4'` is none that can be planned"),
        ({"devices": 2, "precision": "bf16-true", "strategy": "rlhf_fsdp2"}, "use '32-true' or 'bf16-mixed'"),
    ],
)
def test_a_trainer_that_cannot_be_planned_is_refused(trainer, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        Placement.of(trainer)


@pytest.mark.parametrize(
    ("trainer", "placement"),
    [
        ({"devices": 1}, Placement()),
        ({"devices": 2, "num_nodes": 3, "precision": "bf16"}, Placement(6, "ddp", "bf16-mixed")),
        ({"devices": [0, 3], "strategy": "ddp_spawn", "precision": 16}, Placement(2, "ddp", "16-mixed")),
        ({"devices": 1, "strategy": "ddp", "accelerator": "cpu"}, Placement(1, "ddp", is_gpu=False)),
        (
            {"devices": 4, "strategy": {"class_path": "lightning_rlhf.strategies.fsdp2.RLHFStrategy"}},
            Placement(4, "sharded"),
        ),
        (
            {
                "devices": 4,
                "strategy": {
                    "class_path": "lightning_rlhf.strategies.fsdp2.RLHFStrategy",
                    "init_args": {"hold_weights": False},
                },
            },
            Placement(4, "sharded", holds_weights=False),
        ),
        ({"devices": 1, "accumulate_grad_batches": 3}, Placement(accumulates=3)),
    ],
)
def test_a_trainer_s_section_is_read_as_lightning_reads_it(trainer, placement):
    assert Placement.of(trainer) == placement


def test_more_devices_can_be_asked_for_than_the_configuration_has():
    assert Placement.of({"devices": "auto", "strategy": "rlhf_fsdp2"}, 8) == Placement(8, "sharded")
    with pytest.raises(ValueError, match="`devices=0` must be at least 1"):
        Placement.of({}, 0)


def test_what_could_not_run_is_not_planned(tmp_path):
    sharded = Placement(2, "sharded", is_gpu=False)
    eight_bits = module_of(PPOModule, optimizer=functools.partial(bitsandbytes.optim.AdamW8bit, lr=1e-3))
    with pytest.raises(ValueError, match="`optimizer=AdamW8bit` of bitsandbytes cannot update sharded weights"):
        Plan.of(eight_bits, sharded, SIZES)
    network(tiny_gpt2()).save_pretrained(tmp_path)
    rounded = ModelSpec(tmp_path, quantization="nf4", adapter=LORA)
    with pytest.raises(ValueError, match="`quantization='nf4'` cannot be sharded"):
        Plan.of(module_of(PPOModule, rounded), sharded, SIZES)
    with pytest.raises(ValueError, match="leaves the policy nothing to train"):
        Plan.of(module_of(PPOModule, ModelSpec(tmp_path, quantization="nf4")), ONE, SIZES)
    with pytest.raises(ValueError, match=r"`prompt_tokens=60` and a response of 6 .* room for a prompt of 58"):
        Plan.of(module_of(PPOModule), ONE, Sizes(batch=3, prompt=60))
    with pytest.raises(
        ValueError, match="`num_layers_unfrozen=0` leaves GRPOModule nothing to train: unfreeze a block"
    ):
        Plan.of(module_of(GRPOModule, ModelSpec(tiny_gpt2(), num_layers_unfrozen=0)), ONE, SIZES)
    reference = {"reference": ModelSpec(tmp_path, quantization="nf4"), "kl_coef": 0.1, "offload_frozen": True}
    with pytest.raises(ValueError, match="and those of `reference.quantization=.nf4.` stay where they were packed"):
        Plan.of(module_of(PPOModule, **reference), ONE, SIZES)
    reward = RewardModel(ModelSpec(tmp_path, quantization="nf4"), name="judge")
    for arguments, placement in (({"offload_frozen": True}, ONE), ({}, sharded)):
        with pytest.raises(
            ValueError, match="`quantization=.nf4.` of the reward model .judge.: its weights can be nei"
        ):
            Plan.of(module_of(PPOModule, reward=reward, **arguments), placement, SIZES)
    with pytest.raises(ValueError, match="`num_layers_unfrozen=9` is more than the 2 blocks"):
        Plan.of(module_of(PPOModule, ModelSpec(tiny_gpt2(), num_layers_unfrozen=9)), ONE, SIZES)
    with pytest.raises(ValueError, match="`policy='[^']*none'` looks like a folder, and there is none"):
        Plan.of(module_of(PPOModule, str(tmp_path / "none")), ONE, SIZES)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="`policy='[^']*empty'` has no config that can be read"):
        Plan.of(module_of(PPOModule, str(tmp_path / "empty")), ONE, SIZES)


def test_a_critic_that_could_not_train_is_not_planned(tmp_path):
    folder = saved(tmp_path, network(ARCHITECTURES["llama"](hidden_size=64, intermediate_size=128)))

    def planned(spec, **arguments):
        return Plan.of(module_of(PPOModule, spec, **arguments), ONE, SIZES)

    with pytest.raises(ValueError, match="`critic.quantization='nf4'` is for a critic that is an adapter"):
        planned(None, critic=ModelSpec(folder, quantization="nf4"))
    critic = ModelSpec(folder, adapter=LORA, gradient_checkpointing=True)
    with pytest.raises(ValueError, match="`critic.gradient_checkpointing=True`: policy and critic have one model"):
        planned(ModelSpec(folder, adapter=LORA), critic=critic)
    with pytest.raises(ValueError, match="`num_value_layers_unfrozen=3`: it is more than the 2 blocks"):
        planned(None, num_value_layers_unfrozen=3)
    with pytest.raises(ValueError, match=r"more than the critic's positions: .* room for a prompt of 10"):
        Plan.of(module_of(PPOModule, critic=tiny_gpt2(n_positions=16)), ONE, Sizes(batch=3, prompt=11))
    with pytest.raises(ValueError, match="`model=RewardModule` cannot be planned"):
        Plan.of(RewardModule(folder), ONE, SIZES)


def test_an_optimizer_that_looks_at_numbers_is_refused():
    class Looks(torch.optim.SGD):
        def step(self, closure=None):
            for group in self.param_groups:
                assert bool((group["params"][0].grad == 0).all())

    with pytest.raises(ValueError, match="`optimizer=Looks` looks at numbers"):
        Plan.of(module_of(PPOModule, optimizer=functools.partial(Looks, lr=0.1)), ONE, SIZES)


def test_a_plan_reads_no_weights_and_builds_nothing(tmp_path):
    tiny_gpt2().save_pretrained(tmp_path)  # a config alone
    module = module_of(PPOModule, str(tmp_path))
    assert Plan.of(module, ONE, SIZES).total > 0
    assert not module.is_built
