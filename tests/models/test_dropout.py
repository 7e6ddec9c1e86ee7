"""Dropout off and on again, wherever models hide it."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_rlhf.models.dropout import disable_dropout, original_dropout
from tests.networks import ARCHITECTURES, network

TOKENS = torch.arange(12).reshape(2, 6)


def noisy(name: str) -> tuple[Any, list[str]]:
    """A model in training mode with every dropout that its config knows at 0.5, and their names."""
    config = ARCHITECTURES[name]()
    names = [key for key, value in vars(config).items() if "drop" in key and isinstance(value, float)]
    for key in names:
        setattr(config, key, 0.5)
    return network(config).train(), names


def logits(model: nn.Module) -> Tensor:
    return model(input_ids=TOKENS).logits.detach()


def snapshot(model: Any) -> dict[str, Any]:
    """Every attribute of every module, and of the config, that speaks of dropout."""
    owners = {name: vars(module) for name, module in model.named_modules()}
    owners["config"] = vars(model.config)
    found: dict[str, Any] = {}
    for owner, attributes in owners.items():
        for key, value in attributes.items():
            if ("drop" in key or key == "p") and isinstance(value, int | float):
                found[f"{owner}.{key}"] = value
    return found


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in ("rwkv", "mamba")])
def test_two_passes_in_training_mode_are_equal_without_dropout_and_differ_with_it(name: str) -> None:
    model, names = noisy(name)
    assert names
    assert not torch.equal(logits(model), logits(model))

    values = disable_dropout(model)
    assert model.training
    assert torch.equal(logits(model), logits(model))
    assert torch.equal(logits(model), logits(model.eval()))

    with original_dropout(values):
        assert not torch.equal(logits(model.train()), logits(model))
    assert torch.equal(logits(model), logits(model))


@pytest.mark.parametrize("name", ["gpt2", "opt", "gpt_bigcode", "llama", "gpt_neo"])
def test_original_values_come_back_for_a_while_everywhere(name: str) -> None:
    model, names = noisy(name)
    before = snapshot(model)
    assert [before[f"config.{key}"] for key in names] == [0.5] * len(names)

    values = disable_dropout(model)
    off = snapshot(model)
    assert set(off.values()) <= {0}
    with original_dropout(values):
        assert snapshot(model) == before
    assert snapshot(model) == off


def test_original_values_leave_again_when_what_was_to_be_done_fails() -> None:
    model, _ = noisy("gpt2")
    values = disable_dropout(model)
    off = snapshot(model)
    with pytest.raises(RuntimeError, match="disk full"), original_dropout(values):
        raise RuntimeError("disk full")
    assert snapshot(model) == off


def test_values_that_were_different_come_back_different() -> None:
    config = ARCHITECTURES["gpt2"]()
    config.attn_pdrop, config.resid_pdrop, config.embd_pdrop = 0.1, 0.2, 0.3
    model = network(config)
    before = snapshot(model)
    with original_dropout(disable_dropout(model)):
        assert snapshot(model) == before
        assert (model.config.attn_pdrop, model.config.resid_pdrop, model.config.embd_pdrop) == (0.1, 0.2, 0.3)
    assert (model.config.attn_pdrop, model.config.resid_pdrop, model.config.embd_pdrop) == (0.0, 0.0, 0.0)
    assert model.transformer.drop.p == 0.0


def test_what_is_no_dropout_is_left_alone() -> None:
    model, _ = noisy("gpt2")
    epsilons = [module.eps for module in model.modules() if isinstance(module, nn.LayerNorm)]
    others = {key: value for key, value in vars(model.config).items() if "drop" not in key}
    disable_dropout(model)
    assert [module.eps for module in model.modules() if isinstance(module, nn.LayerNorm)] == epsilons
    assert {key: value for key, value in vars(model.config).items() if "drop" not in key} == others
