"""Heads on a language model's states."""

import pytest
import torch
from torch.testing import assert_close

from lightning_rlhf import PPOModule
from lightning_rlhf.models.encoder_decoder import decoder_of
from lightning_rlhf.models.heads import ValueHead
from lightning_rlhf.models.probing import probe, state_scale
from tests.networks import ARCHITECTURES, ENCODER_DECODERS, network, written
from tests.training import module_of


def test_a_value_is_two_layers_with_a_relu_between_by_hand() -> None:
    head = ValueHead(2)
    with torch.no_grad():
        head.hidden.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, 0.0]]))
        head.hidden.bias.copy_(torch.tensor([0.0, 1.0, 0.0, -5.0]))
        head.out.weight.copy_(torch.tensor([[2.0, 10.0, 100.0, 1000.0]]))
        head.out.bias.fill_(0.5)
    states = torch.tensor([[[3.0, 1.0], [-1.0, -2.0]]])
    # relu(3), relu(2), relu(-3), relu(-5); then relu(-1), relu(-1), relu(1), relu(-5)
    assert_close(head(states), torch.tensor([[6.0 + 20.0 + 0.5, 100.0 + 0.5]]), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("width", [1, 8])
def test_one_value_for_every_state_from_a_layer_of_twice_the_width(width: int) -> None:
    head = ValueHead(width)
    assert head(torch.randn(3, 5, width)).shape == (3, 5)
    assert head(torch.randn(1, 1, width)).shape == (1, 1)
    assert {name: tuple(p.shape) for name, p in head.named_parameters()} == {
        "hidden.weight": (2 * width, width),
        "hidden.bias": (2 * width,),
        "out.weight": (1, 2 * width),
        "out.bias": (1,),
    }


def test_every_parameter_can_be_sharded() -> None:
    assert min(parameter.dim() for parameter in ValueHead(4).parameters()) == 1


def test_half_precision_states_are_read_in_the_heads_own_precision() -> None:
    head = ValueHead(4)
    states = torch.randn(2, 3, 4)
    values = head(states.bfloat16())
    assert values.dtype == torch.float32
    assert_close(values, head(states.bfloat16().float()), rtol=0.0, atol=0.0)


def test_a_value_moves_the_states_that_it_was_read_from() -> None:
    states = torch.randn(2, 3, 4, requires_grad=True)
    ValueHead(4)(states)[0, 1].backward()
    touched = (states.grad != 0).any(-1)
    assert touched.tolist() == [[False, True, False], [False, False, False]]


@pytest.mark.parametrize("name", [*ARCHITECTURES, *ENCODER_DECODERS])
@pytest.mark.filterwarnings("ignore:.* cannot be")
def test_a_value_is_read_from_what_the_last_norm_gave(name: str) -> None:
    config = {**ARCHITECTURES, **ENCODER_DECODERS}[name]()
    decoder = decoder_of(network(config))
    probe(decoder)
    # T5's `forward` divides by the root of its width, 16, where its config does not say that the head is untied.
    assert state_scale(decoder) == pytest.approx(4.0 if name == "t5" else 1.0, rel=1e-6)


def test_a_t5_is_worth_what_the_head_says_of_its_final_norm() -> None:
    module = module_of(PPOModule, network(ENCODER_DECODERS["t5"]()))
    module.configure_model()
    policy, seen = module.policy, []
    handle = policy.decoder.model.decoder.final_layer_norm.register_forward_hook(lambda *args: seen.append(args[2]))
    values = policy(written([[1, 2, 3]], [[4, 5]])).values
    handle.remove()
    head = policy.value_head
    expected = head.out(torch.relu(head.hidden(seen[-1]))).squeeze(-1)
    assert_close(values, expected[:, -2:], rtol=0.0, atol=1e-5)
    assert float((values - values.mean()).detach().abs().max()) > 1e-3
