"""What the project has, and keeps as it is: data, tokenizer, network, and a module for supervised training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from torch.utils.data import DataLoader

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

WORDS = ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9", "+", "="]


class Sums(L.LightningDataModule):
    """Sums of two digits below ten: dicts with ``prompt`` and ``answer``, which torch collates to dicts of lists.

    Args:
        batch_size: Rows of a batch.
    """

    def __init__(self, batch_size: int = 11) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.rows = [{"prompt": f"{a} + {b} =", "answer": f"{a + b}"} for a in range(10) for b in range(10 - a)]

    def train_dataloader(self) -> DataLoader:
        """All sums."""
        return DataLoader(self.rows, batch_size=self.batch_size, shuffle=True)  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader:
        """All sums, in order."""
        return DataLoader(self.rows, batch_size=self.batch_size)  # type: ignore[arg-type]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each digit and sign, and the one that ends a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*WORDS, "<eos>"])}))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", padding_side="left")


def build_network() -> GPT2LMHeadModel:
    """A small GPT-2."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    size = {"n_layer": 2, "n_embd": 64, "n_head": 4, "n_positions": 16}
    return GPT2LMHeadModel(GPT2Config(vocab_size=len(WORDS) + 1, bos_token_id=12, eos_token_id=12, **size))


class Imitator(L.LightningModule):
    """Learns to write the answers by maximum likelihood.

    Args:
        network: That writes.
        tokenizer: Its own.
        lr: Learning rate.
    """

    def __init__(self, network: Any, tokenizer: Any, lr: float = 3e-3) -> None:
        super().__init__()
        self.network = network
        self.tokenizer = tokenizer
        self.lr = lr

    def loss(self, batch: dict[str, list[str]]) -> torch.Tensor:
        """Negative log-likelihood of the answer and of the end; all sums are equally long."""
        texts = [f"{prompt} {answer} <eos>" for prompt, answer in zip(batch["prompt"], batch["answer"], strict=True)]
        tokens = self.tokenizer(texts, return_tensors="pt")["input_ids"].to(self.device)
        labels = tokens.clone()
        labels[:, :4] = -100
        return self.network(input_ids=tokens, labels=labels).loss

    def training_step(self, batch: dict[str, list[str]], batch_idx: int) -> torch.Tensor:
        """The loss of a batch."""
        loss = self.loss(batch)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: dict[str, list[str]], batch_idx: int) -> None:
        """The same, of held-out rows."""
        self.log("val_loss", self.loss(batch), batch_size=len(batch["prompt"]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=self.lr)
