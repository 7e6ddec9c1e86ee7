"""PPO with values from a head, a branch of the policy's top blocks, a model of its own, or a second adapter."""

import copy

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from lightning_rlhf import GRPOModule, ModelSpec, PPOModule, PromptDataModule
from lightning_rlhf.batches import PromptBatch
from lightning_rlhf.models.adapter_reference import AdapterReference
from lightning_rlhf.models.adapters import VALUE
from lightning_rlhf.models.heads import LinearValueHead
from lightning_rlhf.models.quantization import quantization_config
from lightning_rlhf.models.reference import fingerprint
from tests.networks import ENCODER_DECODERS, network, tiny_gpt2, word_tokenizer
from tests.training import PROMPTS, Seen, bare_trainer, fit, module_of

LORA = {"peft_type": "LORA", "r": 2, "target_modules": "all-linear"}
POLICIES = {"gpt2": lambda: tiny_gpt2(layers=3), "t5": lambda: ENCODER_DECODERS["t5"](num_decoder_layers=3)}
CRITICS = {
    "head": {},
    "linear": {"value_head": "linear"},
    "branch": {"num_value_layers_unfrozen": 2},
    "critic": {"critic": "policy"},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Policies with their tokenizers."""
    made = {}
    for name, config in POLICIES.items():
        made[name] = tmp_path_factory.mktemp(name)
        network(config()).save_pretrained(made[name])
        word_tokenizer().save_pretrained(made[name])
    return made


def classifier(**more):
    torch.manual_seed(5)
    return AutoModelForSequenceClassification.from_config(
        tiny_gpt2(**{"num_labels": 1, "initializer_range": 0.3, **more})
    )


def ppo(policy, rate=0.05, **arguments):
    return module_of(
        PPOModule, policy, **{"optimizer": lambda groups: torch.optim.SGD(groups, lr=rate, momentum=0.9), **arguments}
    )


def parameters(module):
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def changed(module, before):
    return {name for name, parameter in module.named_parameters() if not torch.equal(parameter, before[name])}


@pytest.mark.invariant(5, 9, 10)
@pytest.mark.parametrize("kind", CRITICS)
@pytest.mark.parametrize("name", POLICIES)
def test_one_iteration_and_the_values_that_it_begins_with_are_those_of_a_pass_that_trains(name, kind, folders):
    module = ppo(folders[name], rate=0.0, num_epochs=1, **CRITICS[kind])
    seen = fit(module, iterations=1)
    metrics, experience = seen.metrics[0], seen.experiences[0]
    assert metrics["policy/ratio"] == pytest.approx(1.0, abs=1e-5)
    assert metrics["kl/sequence"] == pytest.approx(0.0, abs=1e-5)
    assert metrics["value/clip_fraction"] == 0.0
    with torch.no_grad():
        values = module.values(experience, module.policy(experience))
    assert experience.values.abs().max() > 0.01
    mask = experience.response_mask
    assert_close(experience.values[mask], values[mask], rtol=0, atol=1e-5)
    assert experience.values[~mask].abs().sum() == 0
    if module.critic is None:
        assert_close(module.policy.values(experience)[mask], values[mask], rtol=0, atol=1e-5)


@pytest.mark.invariant(12, 23)
@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("unfrozen", [-1, 1])
def test_copies_that_have_not_learnt_say_what_the_shared_head_says_after_the_last_token_too(name, unfrozen, folders):
    spec = ModelSpec(folders[name], num_layers_unfrozen=unfrozen)
    arguments = {"rate": 0.0, "bootstrap_truncated": True, "micro_batch_size": 2}
    arguments["sampling"] = {"max_new_tokens": 10, "temperature": 3.0}
    expected, *others = (
        fit(
            ppo(spec, **arguments, **CRITICS[kind]), iterations=1, prompts=PROMPTS * (4 if name == "gpt2" else 1)
        ).experiences[0]
        for kind in ("head", "branch", "critic")
    )
    assert 0 < expected.truncated.sum() < len(expected)
    assert expected.final_values[expected.truncated].abs().min() > 0
    for experience in others:
        assert torch.equal(experience.response_tokens, expected.response_tokens)
        for field in ("values", "final_values", "returns", "advantages"):
            assert_close(getattr(experience, field), getattr(expected, field), rtol=0, atol=1e-5)


@pytest.mark.invariant(10)
@pytest.mark.parametrize("kind", ["head", "branch", "critic"])
@pytest.mark.parametrize("name", POLICIES)
def test_what_trains_is_what_is_asked_for_and_the_critic_first(name, kind, folders):
    module = ppo(ModelSpec(folders[name], num_layers_unfrozen=1), critic_warmup=1, kl_coef=0.1, **CRITICS[kind])
    module.configure_model()
    before = parameters(module)
    reference = fingerprint(module.reference.network)
    fit(module, iterations=1)
    first = changed(module, before)
    fit(module, iterations=1)
    assert not any(key.startswith("policy.decoder") for key in first)
    prefixes = {
        "head": ("policy.value_head.",),
        "branch": ("policy.value_branch.",),
        "critic": ("critic.value_head.", "critic.decoder."),
    }[kind]
    trained = {key for key, p in module.named_parameters() if p.requires_grad}
    # A relative position or a key's bias may have no gradient to move it.
    assert first <= {key for key in trained if key.startswith(prefixes)}
    assert any(key.startswith(prefixes[-1]) for key in first)
    after = changed(module, before)
    assert after <= trained
    assert any(key.startswith("policy.decoder") for key in after)
    below = (
        "policy.decoder.model.transformer.h.0.",
        "policy.decoder.model.decoder.block.0.",
        "policy.decoder.model.enc",
    )
    assert not any(key.startswith(below) or "shared" in key or "wte" in key for key in after if kind != "critic")
    assert fingerprint(module.reference.network) == reference


def test_the_critic_learns_at_its_own_rate(folders):
    for kind in ("branch", "critic"):
        module = ppo(folders["gpt2"], learning_rates={"value": 0.0}, **CRITICS[kind])
        module.configure_model()
        before = parameters(module)
        fit(module, iterations=1)
        after = changed(module, before)
        assert after
        assert all(key.startswith("policy.decoder.") for key in after)


@pytest.mark.invariant(24, 30)
@pytest.mark.parametrize("kind", ["branch", "critic"])
@pytest.mark.parametrize("name", POLICIES)
def test_no_split_into_micro_batches_changes_what_is_learnt(name, kind, folders):
    results = []
    for split in ({}, {"micro_batch_size": 1}, {"micro_batch_tokens": 9}):
        module = ppo(folders[name], **split, **CRITICS[kind])
        metrics = fit(module, iterations=2).metrics[-1]
        results.append((torch.cat([p.detach().flatten() for p in module.parameters()]), metrics["value/loss"]))
    for found, loss in results[1:]:
        assert_close(found, results[0][0], rtol=0, atol=2e-5)
        assert loss == pytest.approx(results[0][1], abs=2e-5)


def arguments_of(kind, folders):
    return {
        "branch": (folders["gpt2"], {"num_value_layers_unfrozen": 1}),
        "critic": (folders["gpt2"], {"critic": ModelSpec(folders["gpt2"], num_layers_unfrozen=2)}),
        "adapter": (
            ModelSpec(folders["gpt2"], adapter=LORA),
            {"critic": ModelSpec(folders["gpt2"], adapter={**LORA, "r": 3})},
        ),
        "critic_with_adapter": (folders["gpt2"], {"critic": ModelSpec(folders["gpt2"], adapter=LORA)}),
    }[kind]


@pytest.mark.invariant(36)
@pytest.mark.parametrize("kind", ["branch", "critic", "adapter", "critic_with_adapter"])
def test_a_resumed_run_equals_an_uninterrupted_one(kind, folders, tmp_path):
    policy, more = arguments_of(kind, folders)
    data = {"prompts": PROMPTS, "batch_size": 6, "seed": 5}
    first, second, whole, resumed = ppo(policy, **more), ppo(policy, **more), Seen(), Seen()
    keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    bare_trainer(max_epochs=3, callbacks=[keep, whole], enable_checkpointing=True).fit(
        first, datamodule=PromptDataModule(**data)
    )
    path = tmp_path / "epoch=0.ckpt"
    keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    bare_trainer(max_epochs=3, callbacks=[keep, resumed], enable_checkpointing=True).fit(
        second, datamodule=PromptDataModule(**data), ckpt_path=path
    )
    assert len(resumed.metrics) == 2
    for later, expected in zip(resumed.metrics, whole.metrics[1:], strict=True):
        assert {k: v for k, v in later.items() if not k.startswith(("time/", "speed/"))} == {
            k: v for k, v in expected.items() if not k.startswith(("time/", "speed/"))
        }
    mine, its = parameters(first), parameters(second)
    assert all(torch.equal(mine[name], its[name]) for name in mine)


def test_a_checkpoint_does_not_hold_the_frozen_weights_of_a_critic_with_an_adapter(folders, tmp_path):
    policy, more = arguments_of("critic_with_adapter", folders)
    module, trainer = ppo(policy, **more), bare_trainer(max_epochs=1)
    trainer.fit(module, datamodule=PromptDataModule(PROMPTS, batch_size=6))
    trainer.save_checkpoint(tmp_path / "kept.ckpt")
    names = set(torch.load(tmp_path / "kept.ckpt", weights_only=True)["state_dict"])
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    assert {name for name in names if name.startswith("critic.")} == {n for n in trained if n.startswith("critic.")}
    assert {name for name in module.state_dict() if name.startswith("policy.")} <= names  # which trains whole
    network(tiny_gpt2(layers=3), seed=9).save_pretrained(tmp_path / "other")
    word_tokenizer().save_pretrained(tmp_path / "other")
    second = ppo(policy, critic=ModelSpec(tmp_path / "other", adapter=LORA))
    with pytest.raises(ValueError, match="`critic=.*other.*is not the model that `ckpt_path` was trained on: its froz"):
        bare_trainer(max_epochs=2).fit(
            second, datamodule=PromptDataModule(PROMPTS, batch_size=6), ckpt_path=tmp_path / "kept.ckpt"
        )


def test_the_policy_alone_is_exported(folders, tmp_path):
    tokens = torch.tensor([[1, 2, 3, 4]])
    for kind in ("branch", "critic"):
        module = ppo(folders["gpt2"], **CRITICS[kind])
        fit(module, iterations=1)
        module.save_pretrained(tmp_path / kind)
        exported = AutoModelForCausalLM.from_pretrained(tmp_path / kind)
        plain = AutoModelForCausalLM.from_pretrained(folders["gpt2"])
        assert exported.state_dict().keys() == plain.state_dict().keys()
        with torch.no_grad():
            expected = module.policy.decoder(tokens, torch.ones_like(tokens).bool(), keep=4).logits
        assert_close(exported(tokens).logits, expected, rtol=0, atol=1e-5)


@pytest.mark.invariant(17)
def test_a_reward_model_is_where_a_critic_begins(tmp_path, folders):
    model = classifier(layers=1)
    model.save_pretrained(tmp_path)
    module = ppo(folders["gpt2"], rate=0.0, critic=tmp_path, bootstrap_truncated=True)
    experience = fit(module, iterations=1).experiences[0]
    assert isinstance(module.critic.value_head, LinearValueHead)
    model.eval()
    cut = experience.truncated.nonzero().flatten().tolist()
    assert cut
    for i in cut:
        text = torch.cat([experience.prompt_tokens[i][experience.prompt_mask[i]], experience.response_tokens[i]])
        with torch.no_grad():
            expected = model(text[None]).logits[0, 0]
        assert_close(experience.final_values[i], expected, rtol=0, atol=1e-5)


# --- two adapters on one model ----------------------------------------------------------------------------------------


@pytest.mark.invariant(10, 13)
@pytest.mark.parametrize(
    ("name", "layers"), [*((name, None) for name in POLICIES), ("gpt2", ([2], [1])), ("gpt2", ([1], [2]))]
)
def test_two_adapters_learn_from_one_loss_on_one_model(name, layers, folders):
    policy, value = (
        {} if layers is None else {"layers_to_transform": of_one, "target_modules": ["c_attn"]}
        for of_one in (layers or (None, None))
    )
    spec = ModelSpec(folders[name], adapter={**LORA, **policy})
    module = ppo(spec, critic=ModelSpec(folders[name], adapter={**LORA, "r": 3, **value}), kl_coef=0.1)
    module.configure_model()
    assert module.critic is None
    assert isinstance(module.reference, AdapterReference)
    if layers is not None:
        assert len(module.policy.decoder.trunk.frozen) == 1
    model = module.policy.decoder.model
    expected = network(POLICIES[name]())
    size = sum(parameter.numel() for parameter in expected.parameters())
    assert sum(p.numel() for n, p in model.named_parameters() if "lora_" not in n) == size  # the base is there once
    trained = {n for n, p in module.named_parameters() if p.requires_grad}
    assert {n for n in trained if "lora_" not in n} == {
        f"policy.value_branch.value_head.{n}" for n, _ in module.policy.value_branch.value_head.named_parameters()
    }
    groups = {group["name"]: {id(p) for p in group["params"]} for group in module.parameter_groups()}
    assert {id(p) for p in module.policy.decoder.adapters.parameters(VALUE)} < groups["value"]
    assert not groups["policy"] & groups["value"]
    before = parameters(module)
    seen = fit(module, iterations=1)
    assert seen.metrics[0]["kl/sequence"] == pytest.approx(0.0, abs=1e-5)
    after = changed(module, before)
    assert after <= trained
    for adapter in ("default", VALUE):  # what both begin at 0 with
        second = {n for n in trained if f"lora_B.{adapter}." in n}
        assert len(after & second) >= 0.8 * len(second) > 0
    assert {n for n, p in module.named_parameters() if p.requires_grad} == trained
    tokens = torch.tensor([[1, 2, 3, 4, 5, 6]])
    decoder, plain = module.policy.decoder, network(POLICIES[name]())
    plain.load_state_dict({k.replace(".base_layer", ""): v for k, v in model.state_dict().items() if "lora_" not in k})
    with torch.no_grad(), module.reference.in_place():
        logits = decoder(tokens, torch.ones_like(tokens).bool(), keep=6).logits
    more = {"input_ids": tokens} if name == "gpt2" else {"input_ids": tokens[:, :3], "decoder_input_ids": tokens}
    with torch.no_grad():
        assert_close(logits, plain(**more).logits, rtol=0, atol=1e-5)


def test_after_every_switch_what_trains_is_what_trained(folders):
    spec = ModelSpec(folders["gpt2"], adapter=LORA)
    module = ppo(spec, critic="policy")
    module.configure_model()
    flags = {n: p.requires_grad for n, p in module.named_parameters()}
    adapters = module.policy.decoder.adapters
    for name in (VALUE, None):
        with adapters.using(name):
            assert {n: p.requires_grad for n, p in module.named_parameters()} == flags
        assert {n: p.requires_grad for n, p in module.named_parameters()} == flags


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_a_branch_beside_an_adapter_is_of_plain_weights(quantization, tmp_path):
    network(tiny_gpt2(width=64, layers=3)).save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    adapter = {**LORA, "init_lora_weights": False}
    spec = ModelSpec(tmp_path, adapter=adapter, quantization=quantization)
    arguments = {"rate": 0.0, "kl_coef": 0.0}
    shared = fit(ppo(spec, **arguments), iterations=1).experiences[0]
    module = ppo(spec, num_value_layers_unfrozen=2, **arguments)
    experience = fit(module, iterations=1).experiences[0]
    copies = dict(module.policy.value_branch.copies.named_parameters())
    assert all(p.requires_grad and p.is_floating_point() and "lora" not in key for key, p in copies.items())
    assert_close(experience.values, shared.values, rtol=0, atol=1e-4)  # the adapter, which adds something, is merged


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"value_head": "deep"}, r"`value_head='deep'` must be one of 'mlp', 'linear'\."),
        ({"num_value_layers_unfrozen": -1}, "`num_value_layers_unfrozen=-1` must be a number of blocks, or 0"),
        (
            {"num_value_layers_unfrozen": 1, "critic": "policy"},
            "`num_value_layers_unfrozen=1` and `critic` both say where values come from",
        ),
        (
            {"num_value_layers_unfrozen": 1, "compile": True},
            "`compile=True` does not go with `num_value_layers_unfrozen=1`",
        ),
    ],
)
def test_arguments_that_make_no_sense_are_refused(arguments, complaint):
    with pytest.raises(ValueError, match=complaint):
        ppo(tiny_gpt2(), **arguments)


def test_a_module_without_values_knows_no_critic():
    with pytest.raises(TypeError, match="`critic='policy'` is no argument of GRPOModule"):
        module_of(GRPOModule, critic="policy")


def refused(complaint, policy, **arguments):
    module = ppo(policy, **arguments)
    with pytest.raises(ValueError, match=complaint):
        module.configure_model()


def test_a_critic_of_another_vocabulary_is_refused(folders, tmp_path):
    other = copy.deepcopy(folders["gpt2"])
    network(tiny_gpt2(12)).save_pretrained(tmp_path)
    word_tokenizer(12).save_pretrained(tmp_path)
    refused(
        "is of another vocabulary than the policy: '<eos>' is its token 10, and the policy's 22", other, critic=tmp_path
    )
    refused("`critic` knows 12 tokens, and the policy's tokenizer 24", other, critic=tiny_gpt2(12))


def test_a_prompt_that_is_too_long_for_the_critic_alone_is_refused_whatever_deals_the_prompts(folders):
    tokens = torch.ones(1, 3, dtype=torch.long)
    prompts = PromptBatch(prompt_tokens=tokens, prompt_mask=tokens.bool(), prompts=["b b b"])
    roomy, narrow = (ppo(folders["gpt2"], critic=tiny_gpt2(n_positions=positions)) for positions in (9, 8))
    for module in (roomy, narrow):
        module.configure_model()
    roomy.add_values(roomy.rollout(prompts), with_final_values=True)
    with pytest.raises(ValueError, match="0 of the batch has 3 tokens.*`max_new_tokens=6`.*than the critic's 8 positi"):
        narrow.rollout(prompts)
    assert narrow.max_prompt_tokens == 2


def test_critics_that_cannot_be_are_refused(folders):
    refused("`num_value_layers_unfrozen=4`: it is more than the 3", folders["gpt2"], num_value_layers_unfrozen=4)
    spec = ModelSpec(folders["gpt2"], quantization="nf4")
    refused("`critic.quantization='nf4'` is for a critic that is an adapter", folders["gpt2"], critic=spec)
    policy = ModelSpec(folders["gpt2"], adapter=LORA)
    spec = ModelSpec(folders["gpt2"], adapter=LORA, gradient_checkpointing=True)
    refused("`critic.gradient_checkpointing=True`: policy and critic have one model", policy, critic=spec)
    both = {"policy": spec, "critic": "policy", "compile": True}
    refused("`compile=True` does not go with `gradient_checkpointing` where policy and critic are two adapters", **both)
    spec = ModelSpec(folders["gpt2"], adapter={**LORA, "bias": "all"})
    refused("`critic.adapter.bias='all'` trains biases of the model", policy, critic=spec)
    ada = {"peft_type": "ADALORA", "target_modules": ["c_attn"], "total_step": 100, "init_r": 4, "target_r": 2}
    spec = ModelSpec(folders["gpt2"], adapter=ada)
    refused("`critic.adapter` of type ADALORA: ranks are reduced", folders["gpt2"], critic=spec)


def test_a_folder_that_holds_an_adapter_alone_goes_with_the_model_that_it_is_for(folders, tmp_path):
    policy = ModelSpec(folders["gpt2"], adapter={**LORA, "init_lora_weights": False})
    trained = ppo(policy)
    trained.save_pretrained(tmp_path)
    refused(
        r"`critic='.*'` holds an adapter and no model: pass `ModelSpec\(<the model>, adapter=", policy, critic=tmp_path
    )
    module = ppo(policy, critic=ModelSpec(folders["gpt2"], adapter=tmp_path))
    module.configure_model()
    state, adapters = module.policy.state_dict(), module.policy.decoder.adapters
    expected = {n: p for n, p in trained.policy.named_parameters() if "lora_" in n}
    assert all(torch.equal(state[n.replace(".default.", f".{VALUE}.")], p) for n, p in expected.items())
    assert all(parameter.requires_grad for parameter in adapters.parameters(VALUE))


@pytest.mark.parametrize("auto", [AutoModelForCausalLM, AutoModelForSequenceClassification])
def test_a_quantised_object_is_no_critic(auto, folders, tmp_path):
    torch.manual_seed(0)
    auto.from_config(tiny_gpt2(width=64, num_labels=1)).save_pretrained(tmp_path)
    model = auto.from_pretrained(tmp_path, quantization_config=quantization_config("nf4", torch.float32))
    refused(
        "`critic=GPT2.*` is quantised, and rounded weights have no gradient: pass one", folders["gpt2"], critic=model
    )
