"""Log-probs straight from states: what they are by way of logits, with any chunks, kept softmax or none."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_rlhf.functional import head
from lightning_rlhf.functional.head import head_logprobs
from lightning_rlhf.functional.logprobs import response_logprobs

VOCABULARY, WIDTH = 37, 12


def inputs(*shape: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    states, weight, bias = torch.randn(*shape, WIDTH), torch.randn(VOCABULARY, WIDTH), torch.randn(VOCABULARY)
    given = [tensor.to(dtype).requires_grad_() for tensor in (states, weight, bias)]
    return *given, torch.randint(VOCABULARY, shape)


def gradients(outputs: tuple[Tensor, Tensor], given: list[Tensor], entropy: float = 0.3) -> list[Tensor]:
    weights = torch.linspace(-1.0, 2.0, outputs[0].numel()).view(outputs[0].shape)
    return list(torch.autograd.grad((weights * (outputs[0] + entropy * outputs[1].cos())).sum(), given))


@pytest.mark.invariant(5, 30)
@pytest.mark.parametrize("kept_bytes", [0, 2**30])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize(("entries", "read"), [(1, 1), (5, 40), (VOCABULARY, 10**6)])
def test_outputs_and_gradients_are_those_by_way_of_logits(
    entries: int, read: int, temperature: float, kept_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "TILE", 60 * entries)
    monkeypatch.setattr(head, "NARROWEST", 1)
    monkeypatch.setattr(head, "READ_AT_ONCE", read)
    states, weight, bias, tokens = inputs(3, 20)
    expected = response_logprobs(states @ weight.T + bias, tokens, temperature)
    found = head_logprobs(states, weight, bias, tokens, temperature, kept_bytes)
    for mine, theirs in zip(found, expected, strict=True):
        assert_close(mine, theirs, rtol=1e-10, atol=1e-12)
    given = [states, weight, bias]
    for mine, theirs in zip(gradients(found, given), gradients(expected, given), strict=True):
        assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.invariant(5, 30)
@pytest.mark.parametrize("kept_bytes", [0, 2**30])
@pytest.mark.parametrize(("entries", "temperature"), [(5, 1.0), (VOCABULARY, 0.6)])
def test_an_entropy_that_is_only_looked_at_adds_nothing(
    entries: int, temperature: float, kept_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "TILE", 20 * entries)
    monkeypatch.setattr(head, "NARROWEST", 1)
    states, weight, bias, tokens = inputs(20)
    found = head_logprobs(states, weight, bias, tokens, temperature, kept_bytes)
    expected = response_logprobs(states @ weight.T + bias, tokens, temperature)
    given = [states, weight, bias]
    for mine, theirs in zip(gradients(found, given, 0.0), gradients(expected, given, 0.0), strict=True):
        assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("frozen", [0, 1])
def test_what_is_frozen_gets_no_gradient(frozen: int) -> None:
    states, weight, _, tokens = inputs(20)
    given = [states, weight]
    given[frozen] = given[frozen].detach()
    found = head_logprobs(*given, None, tokens)
    expected = response_logprobs(given[0] @ given[1].T, tokens)
    (mine,), (theirs,) = (gradients(outputs, [given[1 - frozen]]) for outputs in (found, expected))
    assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


def test_half_precision_is_read_in_single_precision() -> None:
    states, weight, _, tokens = inputs(20, dtype=torch.bfloat16)
    found = head_logprobs(states, weight, None, tokens)
    assert found[0].dtype == torch.float32
    logits = (states @ weight.T).float()
    assert_close(found[0], response_logprobs(logits, tokens)[0], rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(
        gradients(found, [states, weight]), gradients(response_logprobs(logits, tokens), [states, weight]), strict=True
    ):
        assert mine.dtype == torch.bfloat16
        assert_close(mine, theirs, rtol=0.02, atol=0.02)


def test_autocast_reaches_the_product() -> None:
    states, weight, _, tokens = inputs(20, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = head_logprobs(states, weight, None, tokens)
    expected = head_logprobs(states.bfloat16(), weight.bfloat16(), None, tokens)
    assert torch.equal(found[0], expected[0])
    assert all(gradient.dtype == torch.float32 for gradient in gradients(found, [states, weight]))


class LargestTensor(TorchDispatchMode):
    """Remembers how large the largest tensor was that any operator made."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            self.numel = max(self.numel, tensor.numel() if isinstance(tensor, Tensor) else 0)
        return result


def test_no_logits_of_all_tokens_are_ever_there_where_none_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "TILE", 64 * 8)
    monkeypatch.setattr(head, "NARROWEST", 1)
    states, weight, _, tokens = inputs(64)
    with LargestTensor() as largest:
        outputs = head_logprobs(states, weight, None, tokens, kept_bytes=0)
        gradients(outputs, [states, weight])
    assert largest.numel < 64 * VOCABULARY / 2


@pytest.mark.invariant(16)
@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_a_temperature_that_is_not_positive_is_an_error(temperature: float) -> None:
    states, weight, bias, tokens = inputs(2)
    with pytest.raises(ValueError, match=f"`temperature={temperature}` must be positive: logits are divided by it"):
        head_logprobs(states, weight, bias, tokens, temperature)
