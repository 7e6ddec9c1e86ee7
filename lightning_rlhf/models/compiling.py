"""Blocks that ``torch.compile`` compiles."""

from __future__ import annotations

from typing import Any

from lightning_rlhf.models.decoder import Decoder


def compile_blocks(decoder: Decoder, **options: Any) -> None:
    """Compiles the blocks of a decoder, each by itself; lengths may differ from pass to pass.

    Args:
        decoder: Changed in place.
        **options: Of ``torch.compile``.

    Raises:
        ValueError: If the blocks were not found.
    """
    if decoder.blocks is None:
        raise ValueError(
            f"`compile={options or True}`: the blocks of {type(decoder.model).__name__} were not found: leave it out."
        )
    for name in decoder.blocks.blocks:
        decoder.model.get_submodule(name).compile(**{"dynamic": True, **options})
    decoder.is_compiled = True
