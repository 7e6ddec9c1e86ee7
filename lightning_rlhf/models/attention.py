"""Attention within rows that lie one behind the other."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ATTENTION = "lightning_rlhf_rows"
"""Name of our attention function among those of transformers."""

SHORT = 256
"""Tokens of a segment up to which attention is spelt out on a CPU: torch's fused operator, which holds no weights of
attention, takes half as long again there."""

WIDEST_HEAD = 256
"""Channels of a head that the kernels of a GPU read."""

_MORE = ("dropout", "softcap", "position_bias", "s_aux", "cache", "output_attentions")
"""What else attention may be asked for."""

_noticed: list[list[bool]] = []
"""What :func:`noticing` collects, for as long as somebody wants to know."""


@contextmanager
def noticing() -> Iterator[list[bool]]:
    """Listens for what :func:`rows_attention` is asked.

    Yields:
        Of every call to come, whether one kernel of a GPU could say it.
    """
    _noticed.append([])
    try:
        yield _noticed[-1]
    finally:
        _noticed.pop()


def packs(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether there is one kernel for rows of different lengths: on GPUs, in half precision.

    Args:
        device: Where it would run.
        dtype: Of the weights; what autocast computes in counts instead where it is on.

    Returns:
        The answer.
    """
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    return device.type == "cuda" and dtype in (torch.float16, torch.bfloat16) and _has_kernel(device)


@lru_cache(maxsize=8)
def _has_kernel(device: torch.device) -> bool:
    """Whether a GPU is new enough (Ampere), and torch was built with the kernel."""
    return torch.cuda.get_device_capability(device) >= (8, 0) and torch.backends.cuda.is_flash_attention_available()


def attention_kernels(device: torch.device) -> AbstractContextManager[Any]:
    """Those of torch that may be asked: not cuDNN's, which on an H200 took seconds to be ready for every new length.

    Args:
        device: On which attention runs.

    Returns:
        A context in which others are not asked.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if device.type != "cuda":
        return nullcontext()
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


@torch.compiler.disable  # type: ignore[untyped-decorator]
def rows_attention(
    module: torch.nn.Module,
    query: Float[Tensor, "1 heads total width"],
    key: Float[Tensor, "1 keys total width"],
    value: Float[Tensor, "1 keys total width"],
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention within rows that lie one behind the other; anything else goes to transformers' SDPA.

    Args:
        module: That attends.
        query: Of all rows.
        key: Of all rows.
        value: Of all rows.
        attention_mask: (1, 1, segments, 2) of integers: how long each segment is, and the number of the segment that it
            looks back at beside itself, or -1; any other mask, or None, is SDPA's.
        **kwargs: SDPA's, among them a layer's ``sliding_window``.

    Returns:
        (1, total, heads, width), and None.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if attention_mask is None or attention_mask.dtype != torch.int64:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    segments = attention_mask[0, 0].tolist()
    for noticed in _noticed:
        noticed.append(_is_one_kernel(module, query, key, value, kwargs))
    if packs(query.device, query.dtype) and _is_one_kernel(module, query, key, value, kwargs):
        return _packed(query, key, value, segments, **kwargs), None
    lengths = [length for length, _ in segments]
    window = kwargs.get("sliding_window")
    queries, keys, values = (tensor.split(lengths, dim=2) for tensor in (query, key, value))
    outputs = []
    for i, (length, prefix) in enumerate(segments):
        if length == 0:
            continue
        k, v, before = keys[i], values[i], 0
        if prefix >= 0:
            before = lengths[prefix]
            k, v = torch.cat([keys[prefix], k], dim=2), torch.cat([values[prefix], v], dim=2)
        reaches = before + length
        is_plain = before == 0 and (window is None or length <= window)
        mask = None if is_plain else _band(before, length, reaches if window is None else window, query.dtype)
        mask = None if mask is None else mask.to(query.device)
        if is_plain and length <= SHORT and _is_simple(module, queries[i], k, kwargs):
            outputs.append(_spelt_out(queries[i], k, v, kwargs.get("scaling")))
        else:
            outputs.append(sdpa_attention_forward(module, queries[i], k, v, mask, **kwargs)[0])
    return torch.cat(outputs, dim=1), None


def _is_simple(module: torch.nn.Module, query: Tensor, key: Tensor, kwargs: dict[str, Any]) -> bool:
    """Whether it is worth while on a CPU to spell it out: as many keys as queries, and nothing more."""
    return (
        query.device.type == "cpu"
        and query.dtype in (torch.float32, torch.float64)
        and query.shape == key.shape
        and _is_plain(module, kwargs)
    )


def _is_plain(module: torch.nn.Module, kwargs: dict[str, Any]) -> bool:
    """Whether two products and a softmax say it: causal, and nothing added, dropped out or bounded."""
    causal = kwargs.get("is_causal")
    return bool(
        (getattr(module, "is_causal", True) if causal is None else causal)
        and all(not isinstance(kwargs.get(name), Tensor) and not kwargs.get(name) for name in _MORE)
    )


def _is_one_kernel(module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, kwargs: dict[str, Any]) -> bool:
    """Whether the kernels of a GPU for rows of different lengths can be asked."""
    width = query.shape[-1]
    is_even = width == key.shape[-1] == value.shape[-1]  # DeepSeek's are not
    return _is_plain(module, kwargs) and is_even and width <= WIDEST_HEAD and width % 8 == 0


class _Packing(NamedTuple):
    """Where segments begin, in the form in which the kernels of a GPU are told."""

    queries: Tensor  # (segments + 1,) of 32-bit integers: where each begins
    keys: Tensor  # likewise, of the keys that each looks at
    looked_at: Tensor | None  # (keys,), which keys these are; None where they are those of the line, in order
    longest_query: int
    longest_key: int


@lru_cache(maxsize=8)
@torch.inference_mode(False)  # or what validation asked for first could not be kept for a gradient
def _packing(segments: tuple[tuple[int, int], ...], device: torch.device) -> _Packing:
    starts = [0]
    for length, _ in segments:
        starts.append(starts[-1] + length)
    spans = [
        ([] if prefix < 0 else [(starts[prefix], segments[prefix][0])]) + [(starts[i], length)]
        for i, (length, prefix) in enumerate(segments)
        if length
    ]
    queries = torch.tensor([0, *(span[-1][1] for span in spans)]).cumsum(0)
    keys = torch.tensor([0, *(sum(length for _, length in span) for span in spans)]).cumsum(0)
    index = None
    if any(len(span) > 1 for span in spans):
        index = torch.cat([torch.arange(start, start + length) for span in spans for start, length in span]).to(device)
    longest = max(span[-1][1] for span in spans), max(sum(length for _, length in span) for span in spans)
    begins = [cumulated.to(device, torch.int32) for cumulated in (queries, keys)]
    return _Packing(begins[0], begins[1], index, *longest)


def _packed(
    query: Float[Tensor, "1 heads total width"],
    key: Float[Tensor, "1 keys total width"],
    value: Float[Tensor, "1 keys total width"],
    segments: list[list[int]],
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> Float[Tensor, "1 total heads width"]:
    """All segments by one kernel, each of them looking at its prefix and itself."""
    from torch.nn.attention.varlen import varlen_attn

    packing = _packing(tuple((length, prefix) for length, prefix in segments), query.device)
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else query.dtype
    q, k, v = (tensor[0].transpose(0, 1).to(dtype) for tensor in (query, key, value))
    if packing.looked_at is not None:
        k, v = k.index_select(0, packing.looked_at), v.index_select(0, packing.looked_at)
    grouped: dict[str, Any] = {"enable_gqa": True} if q.shape[1] != k.shape[1] and _is_asked_for_groups() else {}
    back = -1 if sliding_window is None else sliding_window - 1
    attended = varlen_attn(
        q.contiguous(),
        k.contiguous(),
        v.contiguous(),
        packing.queries,
        packing.keys,
        packing.longest_query,
        packing.longest_key,
        scale=scaling,
        window_size=(back, 0),
        **grouped,
    )
    assert isinstance(attended, Tensor)  # nothing beside it was asked for
    return attended[None]


@lru_cache(maxsize=1)
def _is_asked_for_groups() -> bool:
    """Whether torch wants to be told that several heads share keys; before 2.12 it sees that."""
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters


def _spelt_out(
    query: Float[Tensor, "1 heads length width"],
    key: Float[Tensor, "1 heads length width"],
    value: Float[Tensor, "1 heads length width"],
    scaling: float | None,
) -> Float[Tensor, "1 length heads width"]:
    """Causal attention by products of matrices, as it is written in the paper."""
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    mask = _band(0, query.shape[2], query.shape[2], query.dtype)[0]
    weights = torch.baddbmm(mask, query[0], key[0].transpose(1, 2), alpha=scaling).softmax(-1)
    return torch.bmm(weights, value[0]).transpose(0, 1)[None]


@lru_cache(maxsize=512)
@torch.inference_mode(False)
def _band(before: int, length: int, window: int, dtype: torch.dtype) -> Tensor:
    """0 where a token looks, minus infinity elsewhere: back to those before its segment, but not beyond the window."""
    ages = torch.arange(before, before + length)[:, None] - torch.arange(before + length)
    hidden = (ages < 0) | (ages >= window)
    return torch.zeros(1, 1, length, before + length, dtype=dtype).masked_fill_(hidden, -torch.inf)


def install(model: PreTrainedModel) -> bool:
    """Lets a model call :func:`rows_attention` where it calls SDPA.

    Args:
        model: Whose config is changed; an export does not hold the name.

    Returns:
        Whether it asks transformers for its attention function at all, and would have asked for SDPA.
    """
    config = model.config
    if not getattr(model, "_supports_attention_backend", False) or config._attn_implementation != "sdpa":
        return False
    register()
    config._attn_implementation = ATTENTION
    return True


def register() -> None:
    """Tells transformers of :func:`rows_attention`."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(ATTENTION, rows_attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def uninstall(model: PreTrainedModel) -> None:
    """Lets a model call SDPA again.

    Args:
        model: After :func:`install`.
    """
    model.config._attn_implementation = "sdpa"
