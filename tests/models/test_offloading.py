"""Frozen networks that wait in host memory, with the meta device for the one on which they are asked."""

import pytest
import torch
from torch import nn

from lightning_rlhf import ModelSpec, PPOModule, RewardModel
from lightning_rlhf.models import offloading, reference
from lightning_rlhf.models.offloading import fetched, wait
from lightning_rlhf.rewards import model as reward_model
from tests.networks import network, tiny_gpt2, word_tokenizer
from tests.rewards.test_model import classifier
from tests.training import fit, module_of

META = torch.device("meta")


def tensors(module):
    return {**dict(module.named_parameters(remove_duplicate=False)), **dict(module.named_buffers())}


def test_for_a_while_everything_is_on_the_device_and_then_as_it_was():
    model = nn.Sequential(network(tiny_gpt2()), nn.BatchNorm1d(2)).requires_grad_(False)
    before, there = tensors(model), {}

    def fails():
        with fetched(model, META):
            there.update(tensors(model))
            raise KeyError("in the middle")

    with pytest.raises(KeyError, match="in the middle"):
        fails()
    assert {tensor.device for tensor in there.values()} == {META}
    assert [tensor.shape for tensor in there.values()] == [tensor.shape for tensor in before.values()]
    assert there["0.lm_head.weight"] is there["0.transformer.wte.weight"]  # a tied weight is brought once
    assert not any(tensor.requires_grad for tensor in there.values())
    after = tensors(model)
    assert all(after[name] is tensor for name, tensor in before.items())


def test_what_is_on_the_device_already_is_left_alone():
    model = nn.ModuleDict({"shared": nn.Linear(2, 2, device="meta"), "own": nn.Linear(2, 2)})
    with fetched(model, META):
        assert model["own"].weight.is_meta
        shared = model["shared"].weight
    assert model["shared"].weight is shared
    assert shared.requires_grad


def test_sent_to_wait_it_leaves_what_it_shares():
    moved = []

    class Watched(nn.Module):
        def __init__(self, shared):
            super().__init__()
            self.shared, self.own = shared, nn.Parameter(torch.ones(2))

    policy = nn.Linear(1, 1)
    copies = Watched(policy.weight)
    to = torch.Tensor.to
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            torch.Tensor, "to", lambda tensor, *where: moved.append((tensor.shape, where)) or to(tensor, *where)
        )
        wait(copies, shared=policy)
    assert moved == [((2,), (offloading.HOST,))]


@pytest.mark.parametrize("num_layers_unfrozen", [-1, 1])
def test_a_run_whose_frozen_networks_come_and_go_is_the_same(num_layers_unfrozen, monkeypatch):
    """Everything is copied for its phase, as if a CPU of another name were another device."""
    other, brought = torch.device("cpu", 0), []

    def brought_over(network, device):
        brought.append(type(network).__name__)
        assert device == torch.device("cpu")
        return fetched(network, other)

    def run(**more):
        spec = ModelSpec(tiny_gpt2(initializer_range=0.3), num_layers_unfrozen=num_layers_unfrozen)
        reward = RewardModel(classifier(tiny_gpt2()), tokenizer=word_tokenizer())
        module = module_of(PPOModule, spec, reward=reward, kl_coef=0.1, **more)
        return module, fit(module, iterations=2).metrics

    _, expected = run()
    for place in (reference, reward_model):
        monkeypatch.setattr(place, "fetched", brought_over)
    module, metrics = run(offload_frozen=True)
    names = ["GPT2ForSequenceClassification", "Policy" if num_layers_unfrozen == -1 else "FrozenTop"]
    assert brought == names * 2
    for mine, theirs in zip(metrics, expected, strict=True):
        for name in ("kl/sequence", "reward/mean", "policy/loss", "optim/grad_norm"):
            assert mine[name] == theirs[name]
    assert metrics[-1]["kl/sequence"] != 0


def test_what_cannot_be_moved_is_refused_by_name(tmp_path):
    network(tiny_gpt2(width=64)).save_pretrained(tmp_path)
    module = module_of(PPOModule, reference=ModelSpec(tmp_path, quantization="nf4"), offload_frozen=True)
    with pytest.raises(ValueError, match=r"`offload_frozen=True` moves weights.*quantise neither reference nor reward"):
        module.configure_model()
