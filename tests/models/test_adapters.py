"""Adapters: what trains beside a frozen model, and the reference that is the model without it."""

import copy
from typing import Any

import pytest
import torch
from peft import (
    AdaLoraConfig,
    AutoPeftModelForCausalLM,
    FrodConfig,
    IA3Config,
    LoraConfig,
    PeftModel,
    PolyConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
)
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from lightning_rlhf import ModelSpec
from lightning_rlhf.models.adapter_configs import adapter_config, plain_adapter
from lightning_rlhf.models.adapter_reference import AdapterReference, on_the_same_model
from lightning_rlhf.models.adapters import Adapters
from lightning_rlhf.models.decoder import Decoder
from lightning_rlhf.models.freezing import freeze
from lightning_rlhf.models.heads import ValueHead
from lightning_rlhf.models.hydra import reference_of
from lightning_rlhf.models.policy import Policy
from lightning_rlhf.models.probing import probe
from lightning_rlhf.models.reference import Reference
from tests.models.test_reference import BY_LENGTH, rollouts, scored, train
from tests.networks import ARCHITECTURES, MORE, USUAL, deep, network, tiny_gpt2

LORA = {"peft_type": "LORA", "r": 4, "target_modules": "all-linear"}
KINDS: dict[str, Any] = {
    "lora": LoraConfig(r=4),
    "rslora": LoraConfig(r=4, use_rslora=True),
    "dora": LoraConfig(r=4, use_dora=True),
    "ia3": IA3Config(),
    "adalora": AdaLoraConfig(init_r=4, target_r=2, total_step=10, tinit=1, tfinal=2),
}
between_peft_and_transformers = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated", "ignore:fan_in_fan_out is set to False"
)
TOKENS = torch.arange(12).reshape(2, 6)


def policy_of(config: Any, adapter: Any, temperature: float = 1.0) -> Policy:
    model = network(copy.deepcopy(config))
    adapters = ModelSpec(model, adapter=adapter).adapt(model)
    decoder = Decoder(model)
    decoder.adapters = adapters
    probe(decoder)
    freeze(decoder, -1)
    return Policy(decoder, temperature, ValueHead(decoder.width)).eval()


def alone(config: Any, temperature: float = 1.0) -> Policy:
    """The same network with no adapter anywhere."""
    decoder = Decoder(network(copy.deepcopy(config)))
    probe(decoder)
    return Policy(decoder, temperature).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def trained_folder(folder: Any, config: Any = None, adapter: Any = None) -> str:
    """An adapter that is far from nothing, as PEFT writes it."""
    policy = policy_of(config or tiny_gpt2(), adapter or LoraConfig(r=2))
    train(policy)
    policy.decoder.adapters.save(str(folder))
    return str(folder)


# --- the reference --------------------------------------------------------------------------------------------------


@pytest.mark.invariant(10, 11, 13, 16)
@pytest.mark.parametrize("name", [*USUAL, *MORE])
def test_the_adapter_trains_and_nothing_else_and_off_it_leaves_the_model_bit_for_bit(name):
    config = ARCHITECTURES[name]()
    # PEFT has no layers for the experts of so small a Mixtral.
    adapter = LORA if name != "mixtral" else LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    policy = policy_of(config, adapter, temperature=0.7)
    base = alone(config, temperature=0.7)
    trains = {n for n, p in policy.decoder.named_parameters() if p.requires_grad}
    assert trains == {n for n, _ in policy.decoder.named_parameters() if ".lora_" in n}
    assert len(trains) >= 2 * 2 * 2
    reference = reference_of(policy, is_named=True)
    assert isinstance(reference, AdapterReference)
    assert reference.adapter is None
    expected = scored(base, BY_LENGTH, 2)
    assert torch.equal(reference.logprobs(rollouts(), 2), scored(policy, BY_LENGTH, 2))  # the divergence is 0
    assert torch.equal(reference.logprobs(rollouts(), 2), expected)

    before = {n: p.clone() for n, p in policy.decoder.named_parameters()}
    train(policy)
    assert {n for n, p in policy.decoder.named_parameters() if not torch.equal(p, before[n])} == trains
    assert torch.equal(reference.logprobs(rollouts(), 2), expected)
    assert float((scored(policy, BY_LENGTH, 2) - expected).abs().max()) > 1e-3


@between_peft_and_transformers
@pytest.mark.invariant(10, 13)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_every_kind_of_adapter_begins_at_the_model_and_is_merged_into_it(name, kind, tmp_path):
    config = ARCHITECTURES[name]()
    policy = policy_of(config, KINDS[kind])
    reference = reference_of(policy, is_named=True)
    assert reference.adapter is None
    expected = scored(alone(config), BY_LENGTH, 2)
    assert_close(scored(policy, BY_LENGTH, 2), expected, rtol=0, atol=1e-5)
    train(policy)
    with torch.no_grad():
        for parameter in policy.decoder.parameters():  # AdaLoRA begins slowly
            parameter.add_(0.1 * torch.randn_like(parameter) if parameter.requires_grad else 0.0)
    assert torch.equal(reference.logprobs(rollouts(), 2), expected)
    assert float((scored(policy, BY_LENGTH, 2) - expected).abs().max()) > 1e-3

    before = {n: p.clone() for n, p in policy.decoder.named_parameters()}
    merged = policy.decoder.adapters.merged()
    assert_close(logits(merged), logits(policy.decoder.model), rtol=0, atol=2e-5)
    merged.save_pretrained(tmp_path / "merged")
    assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), logits(merged), rtol=0, atol=1e-5)
    assert all(torch.equal(p, before[n]) for n, p in policy.decoder.named_parameters())  # which goes on training

    policy.decoder.adapters.save(str(tmp_path / "adapter"))
    again = policy_of(config, str(tmp_path / "adapter"))
    assert_close(logits(again.decoder.model), logits(policy.decoder.model), rtol=0, atol=1e-6)
    by_peft = PeftModel.from_pretrained(network(config), str(tmp_path / "adapter"))
    assert_close(logits(by_peft), logits(policy.decoder.model), rtol=0, atol=1e-5)


@pytest.mark.invariant(10, 11)
@pytest.mark.parametrize("adapter", ["folder", "pissa", "random"])
def test_an_adapter_that_begins_at_something_is_its_own_reference(adapter, tmp_path):
    config = tiny_gpt2()
    given = {
        "folder": lambda: trained_folder(tmp_path),
        "pissa": lambda: LoraConfig(r=4, init_lora_weights="pissa"),
        "random": lambda: LoraConfig(r=4, init_lora_weights=False),
    }[adapter]()
    policy = policy_of(config, given)
    at_the_start = scored(policy, BY_LENGTH, 2)
    reference = reference_of(policy, is_named=True)
    assert reference.adapter == "reference"
    assert torch.equal(reference.logprobs(rollouts(), 2), at_the_start)
    if adapter != "pissa":  # which begins at the model, in another form
        assert float((at_the_start - scored(alone(config), BY_LENGTH, 2)).abs().max()) > 0.01
    trains = {n for n, p in policy.decoder.named_parameters() if p.requires_grad}
    assert trains == {n for n, _ in policy.decoder.named_parameters() if ".default" in n}
    train(policy)
    assert torch.equal(reference.logprobs(rollouts(), 2), at_the_start)
    assert float((scored(policy, BY_LENGTH, 2) - at_the_start).abs().max()) > 1e-3
    assert set(reference.weights()) == {n for n in policy.decoder.model.state_dict() if ".reference" in n}
    merged = policy.decoder.adapters.merged()
    assert_close(logits(merged), logits(policy.decoder.model), rtol=0, atol=2e-5)


def test_a_reference_with_another_adapter_than_a_checkpoints_is_noticed(tmp_path):
    given = trained_folder(tmp_path)
    policy = policy_of(tiny_gpt2(), given)
    state = reference_of(policy, is_named=True).state_dict()
    assert set(state) == {"fingerprint"}
    same = reference_of(policy_of(tiny_gpt2(), given), is_named=True)
    same.load_state_dict(state)
    same.check()
    other = policy_of(tiny_gpt2(), given)
    train(other, steps=1)
    other = reference_of(other, is_named=True)
    other.load_state_dict(state)
    with pytest.raises(ValueError, match="`reference` is not the one that the checkpoint was trained against"):
        other.check()


@pytest.mark.parametrize("name", [None, "reference"])
def test_what_trains_is_the_same_during_and_after_a_switch(name, tmp_path):
    """PEFT lets what is on train, and nothing else; whole layers and single tokens of an adapter too."""
    adapter = LoraConfig(r=2, modules_to_save=["lm_head"], trainable_token_indices={"wte": [1, 2]})
    policy = policy_of(tiny_gpt2(tie_word_embeddings=False), adapter)
    adapters = policy.decoder.adapters
    adapters.hold(adapters.config, adapters.state(), "reference")
    chosen = next(p for n, p in policy.decoder.named_parameters() if "lora_A.default" in n)
    chosen.requires_grad_(False)  # as a user may have it
    before = {n: p.requires_grad for n, p in policy.decoder.named_parameters()}
    assert sum(before.values()) >= 4
    assert not any(trains for n, trains in before.items() if ".reference" in n)
    outside = logits(policy.decoder.model)
    with adapters.using(name):
        assert {n: p.requires_grad for n, p in policy.decoder.named_parameters()} == before
    assert {n: p.requires_grad for n, p in policy.decoder.named_parameters()} == before
    with pytest.raises(KeyError), adapters.using(name):
        raise KeyError
    assert {n: p.requires_grad for n, p in policy.decoder.named_parameters()} == before
    assert torch.equal(logits(policy.decoder.model), outside)
    chosen.requires_grad_(True)
    policy(rollouts()).logprobs.mean().backward()
    assert all(p.grad is not None for n, p in policy.decoder.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("adapter", [None, "other"])
def test_a_named_reference_on_the_same_model_shares_its_weights(adapter, tmp_path):
    config = tiny_gpt2()
    network(config).save_pretrained(tmp_path / "model")
    spec = ModelSpec(tmp_path / "model", adapter=LoraConfig(r=4))
    other = None if adapter is None else trained_folder(tmp_path / "other")
    expected = scored(alone(config) if other is None else policy_of(config, other), BY_LENGTH, 2)
    policy = policy_of(config, spec.adapter)
    reference = on_the_same_model(policy, spec, ModelSpec(str(tmp_path / "model"), adapter=other))
    assert isinstance(reference, AdapterReference)
    assert torch.equal(reference.logprobs(rollouts(), 2), expected)
    train(policy)
    assert torch.equal(reference.logprobs(rollouts(), 2), expected)
    assert not any(p.requires_grad for n, p in policy.decoder.named_parameters() if ".reference" in n)


def test_a_named_reference_that_cannot_share_is_a_model_of_its_own(tmp_path):
    config = tiny_gpt2()
    lora = trained_folder(tmp_path / "lora")
    policy = policy_of(config, IA3Config())
    spec = ModelSpec("here", adapter=IA3Config())
    assert on_the_same_model(policy, spec, ModelSpec("there")) is None
    assert on_the_same_model(policy, spec, ModelSpec("here", dtype="bfloat16")) is None
    assert on_the_same_model(policy, spec, ModelSpec("here", adapter=lora)) is None  # PEFT mixes no types
    assert on_the_same_model(alone(config), ModelSpec("here"), ModelSpec("here")) is None
    pissa = LoraConfig(r=4, init_lora_weights="pissa")  # takes a part of the model's weights off them
    assert on_the_same_model(policy_of(config, pissa), ModelSpec("here", adapter=pissa), ModelSpec("here")) is None


def test_a_named_reference_whose_adapter_is_missing_is_refused_by_name():
    missing = ModelSpec("here", adapter="./no/such/adapter")
    with pytest.raises(ValueError, match="`reference.adapter='./no/such/adapter'` looks like a folder, and there is"):
        on_the_same_model(policy_of(tiny_gpt2(), LORA), ModelSpec("here", adapter=LORA), missing)


@pytest.mark.invariant(12)
@pytest.mark.parametrize("name", ["gpt2", "llama", "opt"])
def test_blocks_below_all_adapters_are_run_once(name):
    layers = LoraConfig(r=2, layers_to_transform=[2, 3])
    policy = policy_of(deep(name), layers)
    trunk = policy.decoder.trunk
    assert trunk is not None
    assert trunk.branch == policy.decoder.blocks.blocks[2]
    train(policy)
    batch = rollouts()
    whole = policy(batch)
    tokens = torch.cat([batch.prompt_tokens, batch.response_tokens], 1)[:, :-1].clamp(max=21)
    mask = torch.cat([batch.prompt_mask, torch.ones_like(batch.response_mask)], 1)[:, :-1]
    with torch.no_grad():
        batch.trunk = policy.decoder(tokens, mask, keep=1).trunk
    kept = policy(batch)
    assert_close(
        torch.where(batch.response_mask, kept.logprobs, 0.0),
        torch.where(batch.response_mask, whole.logprobs, 0.0),
        rtol=0,
        atol=1e-5,
    )
    assert policy_of(deep(name), LoraConfig(r=2)).decoder.trunk is None


@pytest.mark.filterwarnings("ignore:RwkvForCausalLM cannot be")
@pytest.mark.invariant(14)
def test_an_adapter_is_put_into_a_model_that_cannot_be_padded():
    policy = policy_of(ARCHITECTURES["rwkv"](), {"peft_type": "LORA", "target_modules": ["key", "value"]})
    reference = reference_of(policy, is_named=True)
    expected = scored(policy, BY_LENGTH, 1)
    train_rows = copy.copy(rollouts().select(torch.tensor([1])))
    optimizer = torch.optim.SGD([p for p in policy.parameters() if p.requires_grad], lr=0.05)
    policy(train_rows).logprobs.mean().backward()
    optimizer.step()
    assert torch.equal(reference.logprobs(rollouts(), 1), expected)


# --- AdaLoRA --------------------------------------------------------------------------------------------------------


@between_peft_and_transformers
def test_ranks_are_taken_away_as_adalora_plans(tmp_path):
    config = AdaLoraConfig(init_r=4, target_r=2, total_step=8, tinit=1, tfinal=3, deltaT=1)
    policy = policy_of(tiny_gpt2(), config)
    optimizer = torch.optim.Adam([p for p in policy.parameters() if p.requires_grad], lr=1e-2)
    policy.decoder.adapters.follow(optimizer)
    ranks = []
    for _ in range(8):
        optimizer.zero_grad()
        output = policy(rollouts())
        (output.values - output.logprobs).mean().backward()
        optimizer.step()
        ranks.append(sum(int((p != 0).sum()) for n, p in policy.named_parameters() if "lora_E" in n))
    assert ranks[0] == 4 * 2  # two layers of rank four
    assert ranks[-1] == 2 * 2  # to two on average
    assert ranks == sorted(ranks, reverse=True)
    assert policy.decoder.adapters.updates == 8
    assert policy.decoder.adapters.config.rank_pattern
    policy.decoder.adapters.save(str(tmp_path))  # with the ranks that are 0
    assert policy.decoder.adapters.config.rank_pattern
    own = logits(policy.decoder.model)
    assert float((own - logits(alone(tiny_gpt2()).decoder.model)).abs().max()) > 1e-3
    assert_close(logits(PeftModel.from_pretrained(network(tiny_gpt2()), str(tmp_path))), own, rtol=0, atol=1e-6)
    assert_close(logits(policy_of(tiny_gpt2(), str(tmp_path)).decoder.model), own, rtol=0, atol=1e-6)
    assert_close(logits(policy.decoder.adapters.merged()), own, rtol=0, atol=1e-5)
    optimizer.zero_grad()
    policy(rollouts()).values.mean().backward()
    for parameter in policy.decoder.parameters():
        parameter.grad = None  # as while a critic warms up
    optimizer.step()
    assert policy.decoder.adapters.updates == 8


@pytest.mark.invariant(36)
def test_what_adalora_has_measured_goes_on_from_its_state():
    config = AdaLoraConfig(init_r=4, target_r=2, total_step=40, tinit=1, tfinal=3, deltaT=1)

    def update(policy):
        optimizer = torch.optim.SGD([p for p in policy.parameters() if p.requires_grad], lr=0.1)
        policy.decoder.adapters.follow(optimizer)
        optimizer.zero_grad()
        output = policy(rollouts())
        (output.values - output.logprobs).mean().backward()
        optimizer.step()

    policy, other = policy_of(tiny_gpt2(), config), policy_of(tiny_gpt2(), config)
    for _ in range(3):
        update(policy)
    other.load_state_dict(policy.state_dict())
    other.decoder.adapters.load_state_dict(copy.deepcopy(policy.decoder.adapters.state_dict()))
    update(policy)
    update(other)
    mine, its = policy.decoder.adapters.state_dict(), other.decoder.adapters.state_dict()
    assert (its["updates"], its["rank_pattern"]) == (mine["updates"], mine["rank_pattern"])
    assert mine["updates"] == 4
    for name in ("ipt", "exp_avg_ipt", "exp_avg_unc"):
        assert its["moments"][name].keys() == mine["moments"][name].keys()
        assert all(torch.equal(its["moments"][name][key], value) for key, value in mine["moments"][name].items())
        assert any(value.any() for value in mine["moments"][name].values())
    assert all(torch.equal(p, q) for p, q in zip(policy.parameters(), other.parameters(), strict=True))


# --- what an adapter may be given as --------------------------------------------------------------------------------


def test_an_adapter_is_given_as_a_config_its_fields_or_a_class():
    wanted = LoraConfig(r=4, target_modules=["c_attn"], task_type="CAUSAL_LM")
    for given in (
        wanted,
        {"peft_type": "LORA", "r": 4, "target_modules": ["c_attn"]},
        {"peft_type": "lora", "r": 4, "target_modules": ["c_attn"]},
        {"class_path": "peft.LoraConfig", "init_args": {"r": 4, "target_modules": ["c_attn"]}},
        plain_adapter(wanted),
    ):
        assert adapter_config(given).to_dict() == wanted.to_dict()
    assert adapter_config(wanted) is not wanted
    assert plain_adapter("here") == "here"
    assert plain_adapter(None) is None


@between_peft_and_transformers
def test_a_folder_is_loaded_by_peft_and_transformers_alone(tmp_path):
    network(tiny_gpt2()).save_pretrained(tmp_path / "model")
    model = ModelSpec(tmp_path / "model", adapter=LoraConfig(r=2)).load()
    adapters = Adapters(model, LoraConfig(r=2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 if parameter.requires_grad else 0.0)
    adapters.save(str(tmp_path / "adapter"))
    assert_close(logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")), logits(model))
    assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")), logits(model))


REFUSED = [
    (PromptTuningConfig(num_virtual_tokens=2), "`adapter` of type PROMPT_TUNING puts tokens before the prompt.* LORA"),
    (PrefixTuningConfig(num_virtual_tokens=2), "`adapter` of type PREFIX_TUNING puts tokens before the prompt"),
    ({"peft_type": "P_TUNING", "num_virtual_tokens": 2}, "`adapter` of type P_TUNING puts tokens before the prompt"),
    (
        LoraConfig(alora_invocation_tokens=[1], task_type="CAUSAL_LM"),
        "`adapter.alora_invocation_tokens` switches the adapter on in the mid",
    ),
    (PolyConfig(r=2), "`adapter` of type POLY is mixed anew for every text, .* the same for all, such as LORA"),
    (FrodConfig(), "`adapter` of type FROD keeps weights outside of the layers that it adapts.* such as LORA"),
    (LoraConfig(bias="all"), r"`adapter` trains `.*bias`, a weight of the model itself.*set its `bias='none'`"),
    ({"r": 4}, "`adapter.peft_type=''` must be one of PEFT's, such as 'LORA'"),
    ({"peft_type": "LORAX"}, "`adapter.peft_type='LORAX'` must be one of PEFT's, such as 'LORA'"),
    ("./no/such/adapter", "`adapter='./no/such/adapter'` looks like a folder, and there is none"),
]


@pytest.mark.parametrize(("adapter", "message"), REFUSED)
def test_an_adapter_that_cannot_work_is_refused_by_name(adapter, message):
    with pytest.raises(ValueError, match=message):
        policy_of(tiny_gpt2(), adapter)


def test_what_is_no_adapter_is_refused():
    with pytest.raises(
        TypeError, match=r"`adapter=3` must be a config of PEFT such as `LoraConfig\(\)`, its fields, or"
    ):
        policy_of(tiny_gpt2(), 3)


def test_an_adapter_of_another_model_is_refused(tmp_path):
    folder = trained_folder(tmp_path, tiny_gpt2(width=32))
    with pytest.raises(ValueError, match=r"(?s)`adapter='.*'` is not of this model: .*size mismatch"):
        policy_of(tiny_gpt2(), folder)
    deeper = trained_folder(tmp_path / "shallow", tiny_gpt2(layers=1))
    with pytest.raises(ValueError, match=r"`adapter='.*'` is not of this model: Found missing adapter keys"):
        policy_of(tiny_gpt2(layers=2), deeper)


def test_layers_and_an_adapter_do_not_both_say_what_trains():
    with pytest.raises(ValueError, match="`num_layers_unfrozen=2` and `adapter` both say what trains.*layers_to_trans"):
        ModelSpec("gpt2", num_layers_unfrozen=2, adapter=LoraConfig())


def test_a_folder_that_holds_an_adapter_only_is_no_model(tmp_path):
    trained_folder(tmp_path)
    with pytest.raises(ValueError, match=r"holds an adapter and no model: pass `ModelSpec\(<the model>, adapter='"):
        ModelSpec(tmp_path).load()


def test_a_reference_of_an_adapter_that_is_no_copy_stays_a_reference():
    """The value head is not asked, and the policy's mode stays what it was."""
    policy = policy_of(tiny_gpt2(), LoraConfig(r=2)).train()
    reference = reference_of(policy, is_named=False)
    assert isinstance(reference, Reference)
    assert "weights" not in reference.state_dict()
    reference.logprobs(rollouts(), 2)
    assert policy.training
    assert all(module.training for module in policy.modules())
