"""Low-rank layers that add in place: what PEFT's own say, with the same gradients and less memory."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import Linear
from torch import nn
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

from lightning_rlhf.functional import linear
from lightning_rlhf.models.linear import speed_up_linears
from lightning_rlhf.models.lora import AddingLinear, fuse_adapters
from lightning_rlhf.planning.live import Live

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to")


class Net(nn.Module):
    """Two layers of either kind, with something between them that keeps its input."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 9), Conv1D(5, 9)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def nets(dtype=torch.float64, **config):
    """The same with PEFT's layers, and with ours."""
    torch.manual_seed(0)
    config = LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": ["first", "second"], **config})
    theirs = get_peft_model(Net().to(dtype), config)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    ours = copy.deepcopy(theirs)
    fuse_adapters(ours)
    return theirs, ours


def ways(net):
    """How often a layer of ours went its own way."""
    gone = []
    for layer in net.modules():
        if type(layer) is AddingLinear:
            layer.base_layer.register_forward_pre_hook(lambda _, inputs: gone.append(inputs[0].dim()))
    return gone


def outputs_and_gradients(net, x):
    x = x.clone().requires_grad_()
    out = net(x)
    net.zero_grad()
    (out * torch.linspace(-1.0, 2.0, out.numel(), dtype=out.dtype).view(out.shape)).sum().backward()
    return [out.detach(), x.grad, *(p.grad for p in net.parameters() if p.grad is not None)]


@pytest.mark.parametrize("shape", [(6,), (4, 6), (2, 3, 6)])
@pytest.mark.parametrize("speeds_up", [False, True])
def test_outputs_and_gradients_are_those_of_pefts(shape, speeds_up):
    theirs, ours = nets()
    if speeds_up:
        speed_up_linears(ours)
    dims, x = ways(ours), torch.randn(shape, dtype=torch.float64)
    found, expected = (outputs_and_gradients(net, x) for net in (ours, theirs))
    assert dims == [2, 2]
    assert len(found) == len(expected) == 2 + 4
    for mine, other in zip(found, expected, strict=True):
        assert_close(mine, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("is_intel", [False, True])
def test_what_onednn_made_is_added_to(is_intel, monkeypatch):
    monkeypatch.setattr(linear, "SMALLEST", 0)
    monkeypatch.setattr(linear, "is_of_intel", lambda: is_intel)
    theirs, ours = nets(torch.float32)
    speed_up_linears(ours)
    x = torch.randn(2, 3, 6)
    for mine, other in zip(outputs_and_gradients(ours, x), outputs_and_gradients(theirs, x), strict=True):
        assert_close(mine, other, rtol=1e-5, atol=1e-5)


def test_several_adapters_are_added_and_none_where_they_are_off():
    theirs, ours = nets()
    for net in (theirs, ours):
        net.add_adapter("other", LoraConfig(r=2, target_modules=["first"], init_lora_weights=False))
        net.base_model.set_adapter(["default", "other"])
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(4, 6, dtype=torch.float64)
    assert_close(ours(x), theirs(x), rtol=1e-6, atol=1e-6)
    for net in (theirs, ours):
        net.base_model.set_adapter("other")
    assert_close(ours(x), theirs(x), rtol=1e-6, atol=1e-6)
    with theirs.disable_adapter(), ours.disable_adapter():
        assert torch.equal(ours(x), theirs(x))
    merged, expected = ours.merge_and_unload(), theirs.merge_and_unload()
    assert torch.equal(merged(x), expected(x))


def test_an_adapter_in_the_weights_is_not_added_once_more():
    theirs, ours = nets()
    x = torch.randn(4, 6, dtype=torch.float64)
    ours.base_model.merge_adapter()
    assert_close(ours(x), theirs(x), rtol=1e-6, atol=1e-6)
    ours.base_model.unmerge_adapter()
    assert_close(ours(x), theirs(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("config", [{"use_dora": True}, {"lora_bias": True}])
def test_what_one_product_does_not_say_is_said_by_pefts_layers(config):
    theirs, ours = nets(**config)
    dims, x = ways(ours), torch.randn(2, 3, 6, dtype=torch.float64)
    assert torch.equal(ours(x), theirs(x))
    assert 3 in dims


def test_dropout_is_that_of_the_adapter():
    theirs, ours = nets(lora_dropout=0.5)
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    for net in (theirs, ours):
        net.train()
    said = []
    for net in (theirs, ours):
        torch.manual_seed(1)
        said.append(net(x))
    assert_close(said[1], said[0], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(ours(x), said[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_and_mixed_precision_go_pefts_way(dtype):
    theirs, ours = nets(torch.float32)
    x = torch.randn(2, 3, 6, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ours(x), theirs(x))
    if dtype is torch.bfloat16:
        for net in (theirs, ours):
            for name, parameter in net.named_parameters():
                parameter.data = parameter if "lora_" in name else parameter.bfloat16()
        assert torch.equal(ours(x), theirs(x))


def test_what_a_hook_keeps_of_the_layer_stays_what_it_was():
    _, ours = nets()
    kept = []
    ours.base_model.model.first.base_layer.register_forward_hook(lambda _, __, out: kept.append((out, out.clone())))
    ours(torch.randn(4, 6, dtype=torch.float64)).sum().backward()
    assert torch.equal(*kept[0])


def test_it_holds_one_output_where_pefts_hold_three():
    def peak(net):
        x = torch.randn(50, 6, dtype=torch.float64)
        with torch.no_grad(), Live("all") as live:
            live.ignore([x, *net.parameters()])
            net.base_model.model.first(x)
        return live.peak.total()

    theirs, ours = nets()
    output = 50 * 9 * 8
    assert peak(ours) < output * 1.5
    assert peak(theirs) > output * 2.5


def test_other_layers_stay():
    class Special(Linear):
        """Of somebody else."""

    theirs, _ = nets()
    theirs.base_model.model.first.__class__ = Special
    fuse_adapters(theirs)
    assert [type(layer) for layer in theirs.modules() if isinstance(layer, Linear)] == [Special, AddingLinear]
