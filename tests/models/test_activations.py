"""Norms in one operator: the same to the last bit on a CPU, and nothing else is taken for one."""

import copy

import pytest
import torch
from torch import nn

from lightning_rlhf.models.activations import RMSNorm, fuse_norms
from tests.networks import ARCHITECTURES, ENCODER_DECODERS, network

OF_ALL = {**ARCHITECTURES, **ENCODER_DECODERS}
WRITTEN_OUT = {"llama", "qwen3", "mistral", "mixtral", "mamba"}


@pytest.mark.parametrize("name", OF_ALL)
def test_a_model_says_the_same_with_fused_norms_and_keeps_its_names(name: str) -> None:
    model = network(OF_ALL[name]())
    fused = copy.deepcopy(model)
    fuse_norms(fused)
    assert any(isinstance(module, RMSNorm) for module in fused.modules()) == (name in WRITTEN_OUT)
    assert list(fused.state_dict()) == list(model.state_dict())
    tokens = torch.arange(8)[None]
    more = {"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        assert torch.equal(fused(input_ids=tokens, **more).logits, model(input_ids=tokens, **more).logits)


class Almost(nn.Module):
    """As Gemma's: the weight is what is added to 1."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4))
        self.eps = 1e-6

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return RMSNorm(nn.Parameter(1.0 + self.weight), self.eps)(states)


class Gated(Almost):
    """As Mamba 2's: without a gate it would be one."""

    def forward(self, states: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        return RMSNorm(self.weight, self.eps)(states if gate is None else states * gate)


class Casts(Almost):
    """As T5's: what it says is of its weight's type where that is half as long."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return RMSNorm(self.weight, self.eps)(states).to(self.weight.dtype)


def test_a_norm_that_is_another_is_left_alone() -> None:
    model = nn.Sequential(Almost(), Gated(), Casts(), nn.LayerNorm(4), nn.Linear(4, 4))
    fuse_norms(model)
    assert not any(isinstance(module, RMSNorm) for module in model)
