"""Linear layers by oneDNN: the same function, the same gradients, the same names."""

import copy

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lightning_rlhf.functional import linear
from lightning_rlhf.functional.linear import onednn, packs, product, suits
from lightning_rlhf.models.linear import packed_bytes, packed_linears, speed_up_linears


@pytest.fixture(params=[True, False], ids=["intel", "others"])
def everything_is_large(request, monkeypatch):
    monkeypatch.setattr(linear, "SMALLEST", 0)
    monkeypatch.setattr(linear, "is_of_intel", lambda: request.param)


def layers():
    torch.manual_seed(0)
    plain = nn.ModuleList([nn.Linear(24, 40), nn.Linear(24, 40, bias=False), Conv1D(40, 24)])
    nn.init.normal_(plain[2].bias)
    fast = copy.deepcopy(plain)
    speed_up_linears(fast)
    return list(zip(plain, fast, strict=True))


@pytest.mark.usefixtures("everything_is_large")
@pytest.mark.parametrize("shape", [(24,), (5, 24), (2, 7, 24)])
def test_outputs_and_gradients_are_those_of_double_precision(shape):
    for plain, fast in layers():
        plain.double()
        x = torch.randn(shape)
        mine, expected = x.clone().requires_grad_(), x.double().requires_grad_()
        weights = torch.randn(*shape[:-1], 40)
        (fast(mine) * weights).sum().backward()
        (plain(expected) * weights).sum().backward()
        torch.testing.assert_close(fast(x), plain(x.double()).float(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(mine.grad, expected.grad.float(), rtol=1e-5, atol=1e-5)
        for name, parameter in fast.named_parameters():
            torch.testing.assert_close(
                parameter.grad, plain.get_parameter(name).grad.float(), rtol=1e-5, atol=1e-5, msg=name
            )


@pytest.mark.usefixtures("everything_is_large")
def test_gradients_lie_as_their_weights_do_so_that_none_is_copied():
    for _, fast in layers():
        seen = []  # before they are added up, which would copy one that lies otherwise
        fast.weight.register_hook(lambda gradient, seen=seen: seen.append(gradient.stride()))
        fast(torch.randn(3, 24)).sum().backward()
        assert seen == [fast.weight.stride()]


@pytest.mark.usefixtures("everything_is_large")
def test_what_is_frozen_gets_no_gradient_and_what_lies_below_it_does():
    for _, fast in layers():
        fast.requires_grad_(False)
        x = torch.randn(3, 24, requires_grad=True)
        fast(x).sum().backward()
        assert fast.weight.grad is None
        assert x.grad.abs().sum() > 0


@pytest.mark.usefixtures("everything_is_large")
def test_a_sliced_input_is_read_where_it_lies():
    for plain, fast in layers():
        x = torch.randn(4, 9, 24)[:, 2:7]
        torch.testing.assert_close(fast(x), plain(x.contiguous()), rtol=1e-5, atol=1e-5)


def test_only_large_products_in_single_precision_on_a_cpu_are_given_to_onednn(monkeypatch):
    x, weight = torch.randn(512, 128), torch.randn(256, 128)
    assert suits(x, weight)
    assert not suits(x[:1], weight)
    assert not suits(x.double(), weight.double())
    assert not suits(x.bfloat16(), weight.bfloat16())
    assert not suits(x.to("meta"), weight.to("meta"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not suits(x, weight)
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    assert not suits(x, weight)


@pytest.mark.parametrize(("name", "is_intel"), [("Intel Xeon 2.50GHz", True), ("AMD EPYC", False), ("unknown", False)])
def test_what_lies_on_its_side_is_left_to_mkl_on_processors_of_intel_only(name, is_intel, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": name})
    linear.is_of_intel.cache_clear()
    x, weight = torch.randn(512, 256), torch.randn(256, 256)
    try:
        assert suits(x, weight)
        assert suits(x, weight.t()) is not is_intel
        assert suits(x.t()[:256], weight) is not is_intel
        assert suits(x[:, :128], weight[:, :128])
    finally:
        linear.is_of_intel.cache_clear()


def test_in_other_precisions_a_layer_is_what_it_was():
    x = torch.randn(600, 128)
    layer = nn.Linear(128, 256)
    fast = copy.deepcopy(layer)
    speed_up_linears(fast)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(fast(x), layer(x))
    assert torch.equal(fast.double()(x.double()), layer.double()(x.double()))


def test_the_product_takes_the_way_of_onednn_where_it_is_large():
    x, weight = torch.randn(512, 128), torch.randn(256, 128, requires_grad=True)
    result = product(x, weight)
    assert torch.equal(result, onednn(x, weight))
    assert result.grad_fn.name() == "_ProductBackward"


def test_names_and_weights_stay_and_copies_are_as_fast():
    for plain, fast in layers():
        assert type(fast) is not type(plain)
        assert isinstance(fast, type(plain))
        assert type(copy.deepcopy(fast)) is type(fast)
        assert list(fast.state_dict()) == list(plain.state_dict())


def test_layers_of_another_class_are_left_alone():
    class Special(nn.Linear):
        """Of somebody else, with a forward of its own."""

    model = nn.Sequential(Special(4, 4), nn.Linear(4, 4))
    speed_up_linears(model)
    assert type(model[0]) is Special
    assert type(model[1]) is not nn.Linear


class Model(nn.Module):
    """Some layers, the last of which is a head over eight words."""

    def __init__(self, **layers):
        super().__init__()
        self.layers = nn.ModuleDict({**layers, "head": nn.Linear(24, 8)})

    def get_output_embeddings(self):
        return self.layers["head"]

    @property
    def packed(self):
        return [name for name, layer in self.layers.items() if "forward" in vars(layer)]


@pytest.mark.usefixtures("everything_is_large")
@pytest.mark.parametrize("shape", [(3, 24), (2, 7, 24), (1, 24)])
def test_packed_layers_say_the_same_while_they_are(shape):
    for plain, fast in layers():
        x = torch.randn(shape)
        with torch.no_grad(), packed_linears(Model(fast=fast), 3, 10):
            assert "forward" in vars(fast)
            torch.testing.assert_close(fast(x), plain(x), rtol=1e-5, atol=1e-5)
        assert "forward" not in vars(fast)
        with torch.no_grad():
            fast.weight.zero_()
        without = plain(x) - x @ (plain.weight.T if type(plain) is nn.Linear else plain.weight)
        torch.testing.assert_close(fast(x), without, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("everything_is_large")
def test_only_what_is_run_in_single_precision_is_packed():
    model = Model(encoder=nn.Linear(24, 40), top=nn.Linear(24, 40), wide=nn.Linear(24, 40).double())
    speed_up_linears(model)
    with packed_linears(model, 3, 10**6, but=["layers.encoder"]):
        assert model.packed == ["top", "head"]
    with torch.autocast("cpu", dtype=torch.bfloat16), packed_linears(model, 3, 10**6):
        assert not model.packed


@pytest.mark.usefixtures("everything_is_large")
def test_copies_take_no_more_than_gradients_and_what_the_head_keeps():
    model = Model(a=nn.Linear(24, 40), b=nn.Linear(24, 40), c=nn.Linear(24, 40)).requires_grad_(False)
    speed_up_linears(model)
    layer, head = 24 * 40 * 4, 24 * 8 * 4
    # A token's exponentials are those of eight words.
    for tokens, expected in [
        (0, []),
        (layer // 32 - 1, ["head"]),
        (layer // 32, ["a"]),
        ((2 * layer + head) // 32, ["a", "b", "head"]),
    ]:
        with packed_linears(model, 3, tokens):
            assert model.packed == expected
        sizes = {"head": head}
        assert packed_bytes(model, 3, tokens) == sum(sizes.get(name, layer) for name in expected)
    model.layers["c"].requires_grad_(True)
    with packed_linears(model, 3, 0):
        assert model.packed == ["a"], "as much memory as its gradient takes, of whichever layer"
    model.requires_grad_(True)
    with packed_linears(model, 3, 0):
        assert model.packed == ["a", "b", "c", "head"]


def test_small_layers_are_not_packed():
    model = Model(large=nn.Linear(256, 256))
    speed_up_linears(model)
    for rows in (127, 128):
        with packed_linears(model, rows, 10**6):
            assert model.packed == ["large"] * (rows == 128), "2^23 multiplications"


@pytest.mark.usefixtures("everything_is_large")
def test_a_shard_is_not_packed_nor_asked_for_anything():
    class Shard(torch.Tensor):
        """As DTensor, whose operators may be collectives."""

        new_empty = expand = None

    assert packs(torch.randn(40, 24), 3)
    assert not packs(torch.randn(40, 24).as_subclass(Shard), 3)
