"""Heads on a language model's states."""

import pytest
import torch
from torch.testing import assert_close

from lightning_rlhf.models.heads import ValueHead


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
