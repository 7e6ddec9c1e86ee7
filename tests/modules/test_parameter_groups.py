"""Groups of parameters, their rates and their decay; 8-bit optimizers of bitsandbytes."""

import functools
import gc

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.optim import GlobalOptimManager
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_rlhf import GRPOModule, ModelSpec, PPOModule, PromptDataModule
from lightning_rlhf.models.reference import fingerprint
from lightning_rlhf.modules.optimization import make_optimizer, parameter_groups
from tests.networks import tiny_gpt2
from tests.training import PROMPTS, Seen, bare_trainer, fit, module_of, sft

eight_bit = functools.partial(bnb.optim.AdamW8bit, lr=1e-2, min_8bit_size=64)


def ppo(policy=None, **arguments):
    return module_of(PPOModule, policy, **arguments)


def optimizer_of(module):
    module.trainer = bare_trainer()
    module.configure_model()
    return module.configure_optimizers()["optimizer"]


def names_of(module, group):
    by_id = {id(parameter): name for name, parameter in module.policy.named_parameters()}
    return {by_id[id(parameter)] for parameter in group["params"]}


# --- groups -----------------------------------------------------------------------------------------------------------


def test_by_default_everything_decays_in_one_group_a_part():
    module = ppo()
    groups = optimizer_of(module).param_groups
    assert [group["name"] for group in groups] == ["policy", "value"]
    assert names_of(module, groups[1]) == {f"value_head.{n}" for n, _ in module.policy.value_head.named_parameters()}
    assert {"weight_decay", "lr"} <= groups[0].keys()


def test_norms_and_biases_may_be_left_without_decay():
    module = ppo(decay_norms_and_biases=False, optimizer=functools.partial(torch.optim.AdamW, weight_decay=0.1))
    groups = {group["name"]: group for group in optimizer_of(module).param_groups}
    assert {name: group["weight_decay"] for name, group in groups.items()} == {
        "policy": 0.1,
        "policy_undecayed": 0.0,
        "value": 0.1,
        "value_undecayed": 0.0,
    }
    for name, group in groups.items():
        found = names_of(module, group)
        without = {n for n in found if n.endswith(".bias") or ".ln_" in n}
        assert without == (found if name.endswith("_undecayed") else set())
    assert sum(len(group["params"]) for group in groups.values()) == len(list(module.policy.parameters()))


def test_what_does_not_decay_stays_where_its_gradient_is_zero():
    module = ppo(
        decay_norms_and_biases=False,
        optimizer=functools.partial(torch.optim.SGD, lr=0.5, weight_decay=0.1),
    )
    optimizer = optimizer_of(module)
    before = {name: parameter.detach().clone() for name, parameter in module.policy.named_parameters()}
    for parameter in module.policy.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in module.policy.named_parameters():
        factor = 1.0 if name.endswith(".bias") or ".ln_" in name else 0.95
        torch.testing.assert_close(parameter.detach(), factor * before[name], rtol=1e-6, atol=0.0)


def test_each_part_has_its_rate_which_the_schedule_multiplies_and_the_log_shows():
    module = ppo(
        learning_rates={"value": 0.4},
        optimizer=functools.partial(torch.optim.SGD, lr=0.1),
        lr_scheduler="linear",
        decay_norms_and_biases=False,
        minibatch_size=6,
        num_epochs=1,
    )
    metrics = fit(module, iterations=2).metrics
    for i, share in enumerate((1.0, 0.5)):
        assert metrics[i]["optim/lr"] == metrics[i]["optim/lr/policy"] == pytest.approx(0.1 * share, rel=1e-6)
        assert metrics[i]["optim/lr/value"] == pytest.approx(0.4 * share, rel=1e-6)
        assert not any(name.endswith("_undecayed") for name in metrics[i])
    rates = {group["name"]: group["initial_lr"] for group in module.trainer.optimizers[0].param_groups}
    assert rates == {"policy": 0.1, "policy_undecayed": 0.1, "value": 0.4, "value_undecayed": 0.4}


def test_a_part_at_rate_zero_stays_as_it_is():
    module = ppo(learning_rates={"policy": 0.0})
    module.configure_model()
    policy, value = fingerprint(module.policy.decoder), fingerprint(module.policy.value_head)
    fit(module, iterations=1)
    assert fingerprint(module.policy.decoder) == policy
    assert fingerprint(module.policy.value_head) != value


def test_a_weight_that_two_parts_share_is_updated_once():
    shared = torch.nn.Linear(2, 2)
    groups = parameter_groups(
        {"policy": shared, "value": torch.nn.Sequential(shared, torch.nn.Linear(2, 1))}, None, True
    )
    assert [(group["name"], len(group["params"])) for group in groups] == [("policy", 2), ("value", 2)]
    assert not {id(p) for p in groups[0]["params"]} & {id(p) for p in groups[1]["params"]}


@pytest.mark.parametrize(
    ("module", "complaint"),
    [
        (
            ppo(learning_rates={"critic": 0.1}),
            "`learning_rates` names 'critic', which is no part .*: 'policy', 'value'",
        ),
        (module_of(GRPOModule, learning_rates={"value": 0.1}), "names 'value', which is no part that trains: 'policy'"),
        (
            ppo(ModelSpec(tiny_gpt2(), num_layers_unfrozen=0), learning_rates={"policy": 0.1}),
            "names 'policy', which is no part that trains: 'value'",
        ),
        (ppo(learning_rates={"value": -0.1}), "`learning_rates={'value': -0.1}` must not be negative"),
        (sft(learning_rates={"value": 0.1}), "`learning_rates` names 'value'"),
    ],
)
def test_rates_that_cannot_be_are_refused(module, complaint):
    with pytest.raises(ValueError, match=complaint):
        optimizer_of(module)


@pytest.mark.parametrize("decays", [True, False])
def test_a_run_is_not_resumed_with_other_groups(tmp_path, decays):
    trainer = bare_trainer(max_epochs=1)
    trainer.fit(ppo(decay_norms_and_biases=decays), datamodule=PromptDataModule(["a", "b"], batch_size=2))
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    other = ppo(decay_norms_and_biases=not decays)
    with pytest.raises(ValueError, match=f"it was trained with `decay_norms_and_biases={decays}`"):
        bare_trainer(max_epochs=2).fit(
            other, datamodule=PromptDataModule(["a", "b"], batch_size=2), ckpt_path=tmp_path / "one.ckpt"
        )


# --- 8 bits -----------------------------------------------------------------------------------------------------------


def state_types(optimizer, module):
    names = {id(parameter): name for name, parameter in module.policy.named_parameters()}
    return {names[id(parameter)]: state["state1"].dtype for parameter, state in optimizer.state.items()}


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_keep_their_state_in_32_bits_and_large_matrices_in_8(tied):
    module = ppo(tiny_gpt2(initializer_range=0.3, tie_word_embeddings=tied), optimizer=eight_bit)
    fit(module, iterations=1)
    types = state_types(module.trainer.optimizers[0], module)
    embeddings = {name for name in types if name.endswith(("wte.weight", "wpe.weight"))}
    assert len(embeddings) == 2
    large = {name for name, p in module.policy.named_parameters() if p.numel() >= 64 and name not in embeddings}
    assert any("lm_head" in name for name in large) == (not tied)
    assert {name for name, dtype in types.items() if dtype == torch.uint8} == large


def test_what_one_optimizer_keeps_in_32_bits_is_no_other_ones_business():
    everyones = GlobalOptimManager.get_instance()
    before = dict(everyones.pid2config)
    for _ in range(3):
        module = ppo(optimizer=eight_bit)
        optimizer_of(module)
        del module
        gc.collect()
    assert everyones.pid2config == before


def test_what_a_user_told_bitsandbytes_holds():
    weight, embedding = torch.nn.Parameter(torch.ones(8, 16)), torch.nn.Parameter(torch.ones(8, 16))
    everyones = GlobalOptimManager.get_instance()
    everyones.override_config(weight, "optim_bits", 32)
    everyones.override_config(embedding, "optim_bits", 8)
    try:
        optimizer = make_optimizer(eight_bit, [{"params": [weight, embedding], "name": "policy"}], [embedding])
        weight.grad, embedding.grad = torch.ones(8, 16), torch.ones(8, 16)
        optimizer.step()
        types = [optimizer.state[parameter]["state1"].dtype for parameter in (weight, embedding)]
        assert types == [torch.float32, torch.uint8]
    finally:
        for parameter in (weight, embedding):
            del everyones.pid2config[id(parameter)]


def test_a_run_in_8_bits_comes_near_the_one_in_32():
    def after(optimizer):
        module = ppo(optimizer=optimizer, seed=1, kl_coef=0.0)
        module.configure_model()
        start = torch.cat([p.detach().flatten().clone() for p in module.policy.parameters()])
        fit(module, iterations=1)
        return torch.cat([p.detach().flatten() for p in module.policy.parameters()]) - start

    same = {"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.0}
    quantised = after(functools.partial(bnb.optim.AdamW8bit, min_8bit_size=64, **same))
    exact = after(functools.partial(torch.optim.AdamW, **same))
    assert float(torch.cosine_similarity(quantised, exact, dim=0)) > 0.98
    assert float(quantised.norm() / exact.norm()) == pytest.approx(1.0, abs=0.05)


@pytest.mark.invariant(36)
@pytest.mark.parametrize("name", ["AdamW8bit", "PagedAdamW8bit"])
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used")
def test_a_run_in_8_bits_is_resumed_exactly(tmp_path, name):
    optimizer = functools.partial(getattr(bnb.optim, name), lr=1e-2, min_8bit_size=64)

    def run(ckpt_path=None, callbacks=()):
        module, seen = ppo(optimizer=optimizer, lr_scheduler="linear", decay_norms_and_biases=False), Seen()
        trainer = bare_trainer(max_epochs=2, callbacks=[*callbacks, seen], enable_checkpointing=bool(callbacks))
        trainer.fit(module, datamodule=PromptDataModule(PROMPTS, batch_size=3, seed=1), ckpt_path=ckpt_path)
        return module, seen

    keep = ModelCheckpoint(
        tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=4, save_on_train_epoch_end=False
    )
    whole, seen = run(callbacks=[keep])
    assert any(s["state1"].dtype == torch.uint8 for s in whole.trainer.optimizers[0].state.values())
    rest, seen_again = run(tmp_path / "step=12.ckpt")
    assert len(seen_again.experiences) == 1
    assert [e.responses for e in seen_again.experiences] == [e.responses for e in seen.experiences[3:]]
    assert fingerprint(rest.policy) == fingerprint(whole.policy)
    for mine, theirs in zip(*(m.trainer.optimizers[0].state.values() for m in (whole, rest)), strict=True):
        assert mine.keys() == theirs.keys()
        for key, value in mine.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(theirs[key])), key


def test_it_may_be_named_by_class_path_and_is_stored_so():
    plain = {"class_path": "bitsandbytes.optim.AdamW8bit", "init_args": {"lr": 0.01}}
    module = ppo(optimizer=plain)
    assert type(optimizer_of(module)) is bnb.optim.AdamW8bit
    stored = ppo(optimizer=eight_bit).hparams["optimizer"]
    assert stored == {
        "class_path": "bitsandbytes.optim.adamw.AdamW8bit",
        "init_args": {"lr": 0.01, "min_8bit_size": 64},
    }


def test_sharded_weights_are_refused():
    class Shard(torch.nn.Parameter):
        full_tensor = None

    groups = [{"params": [Shard(torch.ones(2))], "name": "policy"}]
    with pytest.raises(ValueError, match="`optimizer=AdamW8bit` of bitsandbytes cannot update sharded weights: use"):
        make_optimizer(eight_bit, groups)
