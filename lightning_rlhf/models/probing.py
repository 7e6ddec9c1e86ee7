"""What a decoder can do, found out by trying rather than by name."""

from __future__ import annotations

from dataclasses import replace

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_rlhf.batches import ResponseBatch
from lightning_rlhf.models.attention import install, noticing, uninstall
from lightning_rlhf.models.decoder import Decoder
from lightning_rlhf.models.outputs import same_logits
from lightning_rlhf.models.reading import Reading, first_with_prompt, padded, unpadded


@torch.no_grad()
def probe(decoder: Decoder) -> None:
    """Tries with a few tokens what the model can do, sets the decoder's attributes, and warns of what it cannot.

    Args:
        decoder: Changed in place.

    Raises:
        ValueError: If what it says of a token depends on what follows.
    """
    was_training = decoder.training
    decoder.eval()
    tokens, mask = decoder.sample()
    name = type(decoder.model).__name__
    try:
        plain = decoder(tokens, mask, keep=2).logits
        decoder.find_blocks()
        if not same_logits(decoder(tokens[:, :5], mask[:, :5], keep=1).logits, plain[:, :1]):
            raise ValueError(
                f"`model={name}` looks at tokens that come later, so that it cannot write: take a causal model, or "
                "make this one causal (BERT: `is_decoder=True` in its config)."
            )
        decoder.chooses, decoder.is_plain = _chooses(decoder, tokens)
        decoder.pads = decoder.pads and decoder.bears_padding(tokens, plain)
        decoder.caches = decoder.caches and _caches(decoder, tokens, plain)
        decoder.unpads = decoder.chooses and not decoder.has_encoder and _unpads(decoder, tokens)
    finally:
        decoder.train(was_training)
    if not decoder.caches:
        rank_zero_warn(f"{name} cannot be decoded from a cache: every token reads the whole text again.")
    if not decoder.pads:
        rank_zero_warn(f"{name} cannot be padded on the left: the prompts of a batch must be equally long.")


@torch.no_grad()
def state_scale(decoder: Decoder) -> float:
    """What a model divided its last states by before its head read them, if it did; T5 does, by the root of its width.

    A value head should read them as they were: behind T5's division it sees next to nothing but its own biases.

    Args:
        decoder: Left as it is.

    Returns:
        The number, 1 where states go to the head as they are.
    """
    given: list[Tensor] = []
    body = getattr(decoder.model, "get_decoder", lambda: decoder.model)()
    handle = body.register_forward_hook(lambda module, inputs, output: given.append(output[0]))
    was_training = decoder.training
    decoder.eval()
    try:
        read = decoder(*decoder.sample(), keep=2).states
    finally:
        decoder.train(was_training)
        handle.remove()
    states = given[-1][:, -2:]
    if states.shape != read.shape or torch.equal(states, read):
        return 1.0
    scale = float((states * read).sum() / read.square().sum())
    return scale if same_logits(scale * read, states) else 1.0


def _chooses(decoder: Decoder, tokens: Tensor) -> tuple[bool, bool]:
    """Whether the head may be given single positions, and whether nothing comes after it."""
    positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
    everything = Reading(tokens, positions, torch.ones_like(tokens), 2, tokens[:, 3:5])
    plain = decoder.read(everything).logprobs[:, 1:]
    last = replace(everything, targets=tokens[:, 4:5], chosen=torch.ones(1, dtype=torch.long, device=tokens.device))
    if not same_logits(decoder.read(last).logprobs, plain, spread=1.0):
        return False, False
    head = decoder.model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or not head.weight.is_floating_point():
        return True, False
    decoder.is_plain = True
    try:
        return True, same_logits(decoder.read(last).logprobs, plain, spread=1.0)
    except RuntimeError:
        return True, False  # what is as wide as the vocabulary is added to logits (BART)


def _unpads(decoder: Decoder, tokens: Tensor) -> bool:
    """Whether rows may lie one behind the other; two of these share a prompt."""
    if not install(decoder.model):
        return False
    prompts, responses = torch.cat([tokens[:, :3], tokens[:, :3], tokens[:, 3:]]), tokens.flip(1)[:, :4].repeat(3, 1)
    is_prompt, is_response = torch.ones_like(prompts, dtype=torch.bool), torch.ones_like(responses, dtype=torch.bool)
    is_prompt[2, 0] = is_response[1, 2:] = is_response[2, 3:] = False
    batch = ResponseBatch(
        prompt_tokens=prompts, prompt_mask=is_prompt, response_tokens=responses, response_mask=is_response
    )
    # Every row by itself, without any padding.
    rows = [replace(batch.select(torch.tensor([i]))) for i in range(3)]
    rows[1].response_tokens, rows[1].response_mask = responses[1:2, :2], is_response[1:2, :2]
    rows[2].response_tokens, rows[2].response_mask = responses[2:, :3], is_response[2:, :3]
    rows[2].prompt_tokens, rows[2].prompt_mask = prompts[2:, 1:], is_prompt[2:, 1:]
    expected = torch.cat([decoder.read(padded(row, None, False)).logprobs for row in rows], dim=1)
    try:
        with noticing() as noticed:
            said = decoder.read(unpadded(batch, None, first_with_prompt(batch, shares=True))).logprobs
        found = same_logits(said, expected, spread=1.0)
        decoder.packs = all(noticed)
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
        found = False  # whatever a forward that does not fit stumbles over
    if not found:
        uninstall(decoder.model)
    return found


def _caches(decoder: Decoder, tokens: Tensor, plain: Tensor) -> bool:
    rows = torch.cat([tokens, tokens.flip(1)])
    mask = torch.ones_like(rows, dtype=torch.bool)
    first = tokens.shape[1] - 1
    start = decoder(rows[:, :first], mask[:, :first], keep=1, use_cache=True)
    if not (hasattr(start.cache, "batch_select_indices") and hasattr(start.cache, "batch_repeat_interleave")):
        return False
    start.cache.batch_repeat_interleave(2)
    start.cache.batch_select_indices(torch.ones(1, dtype=torch.long, device=tokens.device))
    step = decoder(tokens[:, first:], mask[:1], keep=1, cache=start.cache, use_cache=True)
    return same_logits(torch.cat([start.logits[:1], step.logits], dim=1), plain)
