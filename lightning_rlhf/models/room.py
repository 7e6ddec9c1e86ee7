"""Whether prompts leave room for their responses."""

from __future__ import annotations

from jaxtyping import Bool
from torch import Tensor

from lightning_rlhf.models.decoder import Decoder


def check_room(decoder: Decoder, prompt_mask: Bool[Tensor, "batch prompt"], max_new_tokens: int, network: str) -> None:
    """Refuses prompts that leave no room for a response.

    Args:
        decoder: That is to read both.
        prompt_mask: True where a token is real.
        max_new_tokens: What a response may need.
        network: What the user calls the decoder's network, for errors.

    Raises:
        ValueError: If prompt and response together would be more than the model has positions.
    """
    room, length = decoder.prompt_room(max_new_tokens), prompt_mask.shape[1]
    if room is not None and length > room:
        i = int(prompt_mask.sum(1).argmax())
        too_long = f"is more than the {room} that the {network}'s encoder reads"
        if not decoder.has_encoder:
            positions = decoder.max_positions
            too_long = f"with `max_new_tokens={max_new_tokens}` is more than the {network}'s {positions} positions"
        raise ValueError(
            f"`prompts`: number {i} of the batch has {length} tokens, which {too_long}: shorten it or leave it out."
        )
