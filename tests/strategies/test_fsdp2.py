"""The strategy for sharded models, on a group of one process; `tests/distributed` has two."""

import os
import socket

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from safetensors.torch import load_file
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from lightning_rlhf import ModelSpec, PPOModule, PromptDataModule, RewardModel, RewardModule
from lightning_rlhf.models.hydra import HydraReference
from lightning_rlhf.strategies import sharding
from lightning_rlhf.strategies.checkpoint_io import replace_folder
from lightning_rlhf.strategies.fsdp2 import RLHFStrategy
from tests.networks import network, tiny_gpt2, word_tokenizer
from tests.training import PROMPTS, bare_trainer, fit, module_of, weights


@pytest.fixture(autouse=True)
def _group(monkeypatch):
    """A port of its own, and no group left over."""
    before = dict(os.environ)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_PORT", str(free.getsockname()[1]))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
    for name in set(os.environ) - set(before):
        del os.environ[name]


def ppo(num_layers_unfrozen=-1, **arguments):
    spec = ModelSpec(tiny_gpt2(initializer_range=0.3), num_layers_unfrozen=num_layers_unfrozen)
    return module_of(PPOModule, spec, kl_coef=0.05, **arguments)


@pytest.mark.parametrize("num_layers_unfrozen", [-1, 1])
def test_everything_is_sharded_block_by_block_and_trains_as_ever(num_layers_unfrozen, tmp_path):
    module = ppo(num_layers_unfrozen)
    seen = fit(module, strategy="rlhf_fsdp2")
    blocks = list(module.policy.decoder.model.transformer.h)
    networks = [module.policy, *blocks, *_parts(module.reference)]
    assert all(isinstance(network, FSDPModule) for network in networks)
    assert all(isinstance(parameter, DTensor) for network in networks for parameter in network.parameters())

    plain = ppo(num_layers_unfrozen)
    expected = fit(plain)
    for experience, other in zip(seen.experiences, expected.experiences, strict=True):
        assert torch.equal(experience.response_tokens, other.response_tokens)
    assert seen.metrics[-1]["optim/grad_norm"] == pytest.approx(expected.metrics[-1]["optim/grad_norm"], rel=1e-5)
    got = torch.cat([parameter.full_tensor().detach().flatten() for parameter in module.policy.parameters()])
    torch.testing.assert_close(got, weights(plain), rtol=0, atol=1e-6)

    module.save_pretrained(tmp_path / "sharded")
    plain.save_pretrained(tmp_path / "plain")
    exports = [AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("sharded", "plain")]
    for weight, other in zip(*(export.parameters() for export in exports), strict=True):
        torch.testing.assert_close(weight, other, rtol=0, atol=1e-6)
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("sharded", "plain")]
    assert sizes[0] == sizes[1]  # a tied head is written once


def _parts(reference):
    if isinstance(reference, HydraReference):
        return list(reference.network.copies)
    return [reference.network, *reference.network.decoder.model.transformer.h]


@pytest.mark.parametrize("adapter", ["lora", "pissa"])
def test_an_adapter_is_sharded_with_its_model_and_exported_whole(adapter, tmp_path):
    fields = {"peft_type": "LORA", "r": 2, "target_modules": "all-linear"}
    if adapter == "pissa":  # whose reference is a copy of it
        fields["init_lora_weights"] = "pissa"

    def build():
        return module_of(PPOModule, ModelSpec(tiny_gpt2(initializer_range=0.3), adapter=fields), kl_coef=0.05)

    module, plain = build(), build()
    seen, expected = fit(module, strategy="rlhf_fsdp2"), fit(plain)
    assert all(isinstance(parameter, DTensor) for parameter in module.policy.parameters())
    for metrics, others in zip(seen.metrics, expected.metrics, strict=True):
        for name in ("kl/sequence", "optim/grad_norm", "policy/loss"):
            assert metrics[name] == pytest.approx(others[name], rel=1e-4, abs=1e-6)
    assert abs(seen.metrics[-1]["kl/sequence"]) > 1e-3
    got = torch.cat([parameter.full_tensor().detach().flatten() for parameter in module.policy.parameters()])
    torch.testing.assert_close(got, weights(plain), rtol=0, atol=1e-6)
    for merge in (False, True):
        for name, one in {"sharded": module, "plain": plain}.items():
            one.save_pretrained(tmp_path / f"{name}-{merge}", merge_adapter=merge)
    name = "adapter_model.safetensors"
    mine, other = (load_file(tmp_path / f"{kind}-False" / name) for kind in ("sharded", "plain"))
    assert mine.keys() == other.keys()
    assert len(mine) == 2 * 2 * 4
    for key, weight in mine.items():
        torch.testing.assert_close(weight, other[key], rtol=0, atol=1e-6)
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / f"{kind}-True") for kind in ("sharded", "plain")]
    logits = [model(input_ids=torch.tensor([[1, 2, 3]])).logits for model in models]
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=1e-5)


def test_what_of_adapters_and_quantisation_cannot_be_sharded_is_refused_by_name(tmp_path):
    network(tiny_gpt2(width=64)).save_pretrained(tmp_path)
    lora, ada = {"peft_type": "LORA"}, {"peft_type": "ADALORA", "total_step": 9, "tinit": 1, "tfinal": 1}
    for arguments in (
        {"policy": ModelSpec(tmp_path, adapter=lora, quantization="nf4")},
        {"policy": ModelSpec(tmp_path), "reference": ModelSpec(tmp_path, quantization="nf4")},
    ):
        with pytest.raises(ValueError, match=r"`quantization` cannot be sharded.*`Trainer\(strategy='ddp'\)`"):
            fit(module_of(PPOModule, kl_coef=0.05, **arguments), strategy="rlhf_fsdp2")
    with pytest.raises(ValueError, match="`adapter` of type ADALORA ranks single weights.* use LORA, or `Trainer"):
        fit(module_of(PPOModule, ModelSpec(tmp_path, adapter=ada)), strategy="rlhf_fsdp2")


def test_a_module_that_was_built_before_is_sharded_when_it_is_trained():
    module = ppo()
    module.generate(["a b"])
    fit(module, iterations=1, strategy="rlhf_fsdp2")
    assert isinstance(module.policy, FSDPModule)


def test_master_weights_stay_single_precision_under_bf16_mixed():
    module = ppo()
    half = fit(module, iterations=1, strategy="rlhf_fsdp2", precision="bf16-mixed").experiences[0]
    assert {parameter.dtype for parameter in module.policy.parameters()} == {torch.float32}
    single = fit(ppo(), iterations=1).experiences[0]
    first = half.old_logprobs[:, 0] - single.old_logprobs[:, 0]  # the passes themselves are not
    assert 1e-5 < first.abs().max() < 0.1


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_a_precision_that_cannot_be_sharded(precision):
    message = rf"`Trainer\(precision='{precision}'\)` cannot be sharded: use '32-true' or 'bf16-mixed'"
    with pytest.raises(ValueError, match=message):
        fit(ppo(), iterations=1, strategy="rlhf_fsdp2", precision=precision)


def test_what_was_left_unsharded_is_noticed_before_anything_is_learnt(monkeypatch):
    monkeypatch.setattr(sharding, "fully_shard", lambda module, **options: None)
    with pytest.raises(ValueError, match=r"^`policy\.decoder\.\S+` of PPOModule trains and is not sharded.*use `Tra"):
        fit(ppo(), iterations=1, strategy="rlhf_fsdp2")


def test_tensor_parallel_layers_are_refused_by_name():
    strategy = ModelParallelStrategy(tensor_parallel_size=2, data_parallel_size=1)
    with pytest.raises(ValueError, match=r"tensor_parallel_size=2.*would split layers.*use `strategy='rlhf_fsdp2'`"):
        fit(ppo(), iterations=1, strategy=strategy)


def test_lightning_s_own_strategy_works_without_tensor_parallelism():
    module = ppo()
    fit(module, iterations=1, strategy=ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1))
    assert isinstance(module.policy, FSDPModule)


def test_what_was_generated_in_an_evaluation_can_be_trained_afterwards():
    class Validated(PPOModule):
        def validation_step(self, batch, batch_idx):
            self.rollout(batch)

    class Data(PromptDataModule):
        def val_dataloader(self):
            return self.train_dataloader()

    module, data = module_of(Validated, kl_coef=0.0), Data(PROMPTS, batch_size=6)
    bare_trainer(strategy="rlhf_fsdp2").validate(module, datamodule=data)
    bare_trainer(strategy="rlhf_fsdp2", max_epochs=1).fit(module, datamodule=data)


@pytest.mark.invariant(39)
@pytest.mark.parametrize("is_folder", [True, False], ids=["folder", "file"])
def test_a_checkpoint_that_fails_leaves_the_old_one_whole(is_folder, tmp_path, monkeypatch):
    module, path = ppo(), tmp_path / "last.ckpt"
    trainer = bare_trainer(strategy=RLHFStrategy(save_distributed_checkpoint=is_folder), max_epochs=1)
    data = PromptDataModule(PROMPTS, batch_size=6)
    trainer.fit(module, datamodule=data)
    trainer.save_checkpoint(path)
    assert path.is_dir() == is_folder
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}

    def fail(*args, **kwargs):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", fail)
        with pytest.raises(BaseException, match="disk full"):  # a folder's writer has a type of its own
            trainer.save_checkpoint(path)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before
    trainer.save_checkpoint(path)  # over the old one
    assert os.listdir(tmp_path) == ["last.ckpt"]

    dist.destroy_process_group()
    other = ppo()
    again = bare_trainer(strategy=RLHFStrategy(save_distributed_checkpoint=is_folder), max_epochs=2)
    again.fit(other, datamodule=PromptDataModule(PROMPTS, batch_size=6), ckpt_path=path)
    assert other.iteration == 2


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to")  # which PEFT then mends by itself
@pytest.mark.parametrize("is_folder", [True, False], ids=["folder", "file"])
def test_a_run_goes_on_with_the_reward_adapter_that_it_is_given_not_with_that_of_the_checkpoint(is_folder, tmp_path):
    base, path = tmp_path / "base", tmp_path / "last.ckpt"
    network(tiny_gpt2()).save_pretrained(base)
    word_tokenizer().save_pretrained(base)
    lora = {"peft_type": "LORA", "r": 2, "init_lora_weights": False}
    judges = {}
    for seed in (1, 2):
        judge = RewardModule(ModelSpec(base, adapter=lora), seed=seed)
        judge.save_pretrained(tmp_path / f"judge{seed}", merge_adapter=False)
        judges[seed] = judge.score(["a b", "c"], ["d e", "f"])
    assert min(abs(a - b) for a, b in zip(judges[1], judges[2], strict=True)) > 1e-3

    def run(seed, **flags):
        judge = tmp_path / f"judge{seed}"
        module = module_of(PPOModule, ModelSpec(base, adapter=lora), tokenizer=None, reward=judge, critic="policy")
        trainer = bare_trainer(strategy=RLHFStrategy(save_distributed_checkpoint=is_folder), **flags)
        return module, trainer

    module, trainer = run(1, max_epochs=1)
    trainer.fit(module, datamodule=PromptDataModule(PROMPTS, batch_size=6))
    trainer.save_checkpoint(path)
    expected = {name: parameter.full_tensor() for name, parameter in module.named_parameters()}
    dist.destroy_process_group()
    for seed in (1, 2):
        module, trainer = run(seed, max_epochs=1)
        trainer.fit(module, datamodule=PromptDataModule(PROMPTS, batch_size=6), ckpt_path=path)
        for name, parameter in module.named_parameters():
            assert torch.equal(parameter.full_tensor(), expected[name]) or (seed == 2 and "reward_adapter" in name)
        assert module.reward.models[0](["a b", "c"], ["d e", "f"]) == pytest.approx(judges[seed], abs=1e-5)
        dist.destroy_process_group()


def test_a_folder_takes_the_place_of_another_or_of_a_file(tmp_path):
    for number in range(3):
        (tmp_path / "new" / "inner").mkdir(parents=True)
        (tmp_path / "new" / "inner" / "part").write_text(str(number))
        if number == 1:
            (tmp_path / "old.old").mkdir()  # left over by a run that was killed
        replace_folder(tmp_path / "new", tmp_path / "old")
        assert (tmp_path / "old" / "inner" / "part").read_text() == str(number)
        assert os.listdir(tmp_path) == ["old"]
    (tmp_path / "file").write_text("a checkpoint of another strategy")
    replace_folder(tmp_path / "old", tmp_path / "file")
    assert (tmp_path / "file").is_dir()
    assert os.listdir(tmp_path) == ["file"]


class WithMore(PPOModule):
    """Builds something beside the policy."""

    def __init__(self, *args, beside, **kwargs):
        super().__init__(*args, **kwargs)
        self.made = [beside]

    def build(self):
        super().build()
        (self.beside,) = self.made


def test_whatever_trains_and_is_not_sharded_is_refused_by_name():
    module = module_of(WithMore, beside=nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"`beside.weight` of WithMore trains and is not sharded.*`self.policy`"):
        fit(module, strategy="rlhf_fsdp2")
    module = module_of(WithMore, beside=nn.Linear(2, 2).requires_grad_(False))
    fit(module, iterations=1, strategy="rlhf_fsdp2")


def test_what_has_no_values_is_refused_before_lightning_wipes_everything():
    module = module_of(WithMore, beside=nn.BatchNorm1d(2, affine=False, device="meta"))
    with pytest.raises(RuntimeError, match="`beside.running_mean` of WithMore is on the meta device and has no values"):
        fit(module, strategy="rlhf_fsdp2")


def judge(**more):
    torch.manual_seed(3)
    model = AutoModelForSequenceClassification.from_config(tiny_gpt2(initializer_range=0.3, num_labels=1))
    return RewardModel(model, tokenizer=word_tokenizer(), append_eos=True, **more)


@pytest.mark.parametrize("arguments", [{}, {"sharded": False}, {"device": "cpu"}])
def test_a_reward_model_is_sharded_block_by_block_unless_told_otherwise(arguments):
    sharded, whole = judge(**arguments), judge()
    seen = fit(module_of(PPOModule, reward=sharded), iterations=2, strategy="rlhf_fsdp2")
    expected = fit(module_of(PPOModule, reward=whole), iterations=2)
    network = sharded.classifier.model
    parts = [network, *network.transformer.h]
    assert [isinstance(part, FSDPModule) for part in parts] == [not arguments] * 3
    assert [isinstance(parameter, DTensor) for parameter in network.parameters()] == [not arguments] * 29
    assert not any(parameter.requires_grad for parameter in network.parameters())
    for experience, other in zip(seen.experiences, expected.experiences, strict=True):
        torch.testing.assert_close(experience.scores.total, other.scores.total, rtol=0, atol=1e-6)


def test_what_of_reward_models_cannot_be_sharded_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"`reward_in_background=True`: the reward model 'GPT2.*sharded=False\)`"):
        fit(module_of(PPOModule, reward=judge(), reward_in_background=True), strategy="rlhf_fsdp2")
    config = tiny_gpt2(width=64, num_labels=1)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    spec = ModelSpec(tmp_path, quantization="nf4")
    with pytest.raises(ValueError, match=r"`reward`: GPT2.* is quantised and cannot be sharded.*sharded=False\)`"):
        fit(module_of(PPOModule, reward=RewardModel(spec)), strategy="rlhf_fsdp2")
    fit(module_of(PPOModule, reward=RewardModel(spec, sharded=False)), iterations=1, strategy="rlhf_fsdp2")


def test_shards_are_not_offloaded():
    with pytest.raises(ValueError, match=r"`offload_frozen=True`: sharded weights stay where they are"):
        fit(ppo(offload_frozen=True), strategy="rlhf_fsdp2")


def test_a_network_that_was_forgotten_is_not_trained_against():
    with pytest.raises(RuntimeError, match="`weight` of Linear was not sharded"):
        sharding.check_sharded(torch.nn.Module(), torch.nn.Linear(1, 1))
