"""Folders of reward models that are an adapter and a head, as PEFT writes them for sequence classifiers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from lightning_rlhf.models.adapter_configs import adapter_config
from lightning_rlhf.models.headed import HeadedModel
from lightning_rlhf.models.loading import ModelSpec
from lightning_rlhf.models.scorer import Scorer

if TYPE_CHECKING:
    from peft import PeftConfig

HOW = "reward.json"
"""Beside PEFT's files: ``mean`` and ``std`` of the scores, how texts are read, and of which model the adapter is."""
WEIGHTS, CONFIG, PREFIX = "adapter_model.safetensors", "adapter_config.json", "base_model.model."
"""PEFT's own files, and what it puts before the names of weights."""


def write_reward_adapter(
    scorer: Scorer, spec: ModelSpec, folder: str, how: Mapping[str, Any], weights: Mapping[str, Tensor] | None = None
) -> None:
    """Writes adapter and head as PEFT does for a sequence classifier.

    Args:
        scorer: With an adapter.
        spec: From which it was loaded.
        folder: Where to.
        how: How its scores are to be read.
        weights: All weights of the model, where they are sharded.

    Raises:
        ValueError: If no policy could bear the adapter.
    """
    from safetensors.torch import load_file, save_file

    name = type(scorer.model).__name__
    if not spec.is_named:
        raise ValueError(
            f"`merge_adapter=False`: the model of the adapter is a {type(spec.model).__name__}, which no policy could "
            "name: leave it out, for a whole model."
        )
    if scorer.head is None or isinstance(scorer.model, HeadedModel):
        raise ValueError(
            f"`merge_adapter=False`: {name} has no head of transformers' that reads one state of a decoder-only model "
            "(or the adapter is in the head too), so that no policy could bear the adapter: leave it out, for a whole "
            "model."
        )
    assert scorer.adapters is not None
    scorer.adapters.save(folder, weights)
    place = Path(folder)
    state = scorer.model.state_dict() if weights is None else weights
    head = {key: value for key, value in state.items() if key.startswith(f"{scorer.head}.")}
    head = {f"{PREFIX}{key}": value.detach().cpu().contiguous() for key, value in head.items()}
    save_file({**load_file(place / WEIGHTS), **head}, place / WEIGHTS, metadata={"format": "pt"})
    config = json.loads((place / CONFIG).read_text())
    config |= {"task_type": "SEQ_CLS", "modules_to_save": [*(config.get("modules_to_save") or []), scorer.head]}
    (place / CONFIG).write_text(json.dumps(config, indent=2))
    (place / HOW).write_text(json.dumps({**how, "model": source_of(spec)}, indent=2))


class RewardAdapter(NamedTuple):
    """What a folder of one holds.

    Attributes:
        config: Of the adapter alone.
        state: Its weights, under the names that PEFT saves.
        head: ``weight``, (1, width), and perhaps ``bias`` of what reads the last state.
        how: How scores are to be read; nothing where another library wrote it.
        source: Of which model it is, as far as that is known.
    """

    config: PeftConfig
    state: dict[str, Tensor]
    head: dict[str, Tensor]
    how: dict[str, Any]
    source: dict[str, Any]

    @classmethod
    def read(cls, folder: str) -> RewardAdapter:
        """Reads a folder.

        Args:
            folder: That holds an adapter and no model.

        Returns:
            What it holds.

        Raises:
            ValueError: If there is no head with one output.
        """
        from safetensors.torch import load_file

        config: Any = adapter_config(folder)
        state = load_file(Path(folder) / WEIGHTS) if (Path(folder) / WEIGHTS).is_file() else {}
        saved = list(getattr(config, "modules_to_save", None) or [])
        heads = [name for name in saved if f"{PREFIX}{name}.weight" in state]
        rows = [state[f"{PREFIX}{name}.weight"].shape[0] for name in heads]
        if rows != [1]:
            raise ValueError(
                f"`reward={folder!r}` is an adapter with {'no head' if not heads else f'heads of {rows} outputs'}, "
                "where a reward model has one head with one output: pass what `RewardModule.save_pretrained(folder, "
                "merge_adapter=False)` writes, or a whole classifier."
            )
        prefix = f"{PREFIX}{heads[0]}."
        head = {name.removeprefix(prefix): state.pop(name) for name in list(state) if name.startswith(prefix)}
        config.modules_to_save = [name for name in saved if name not in heads] or None
        config.task_type = "CAUSAL_LM"
        file = Path(folder) / HOW
        how = json.loads(file.read_text()) if file.is_file() else {}
        given = {"model": config.base_model_name_or_path, "revision": config.revision}
        return cls(config, state, head, how, how.pop("model", given))


def source_of(spec: ModelSpec) -> dict[str, Any]:
    """What a model's weights depend on.

    Args:
        spec: Of the model.

    Returns:
        Plain values; None throughout where it is an object.
    """
    plain = spec.plain() or {}
    return {name: plain.get(name) for name in ("model", "revision", "dtype", "quantization", "gguf_file")}
