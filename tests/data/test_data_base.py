import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, DistributedSampler

from lightning_rlhf import ConversationDataModule, PromptDataModule
from lightning_rlhf.chance import run_seed
from tests.networks import word_tokenizer
from tests.training import bare_trainer

PROMPTS = list("abcdefghij")


class Reader(L.LightningModule):
    """Learns nothing, and remembers which prompts it was given."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.read = []

    def training_step(self, batch, batch_idx):
        self.read.append("".join(batch.prompts))
        return self.weight.sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def prompts(cls=PromptDataModule, **arguments):
    data = cls(PROMPTS, **{"batch_size": 3, "seed": 0, **arguments})
    data.tokenizer = word_tokenizer()
    return data


def read(data, ckpt_path=None, **flags):
    reader = Reader()
    bare_trainer(**flags).fit(reader, datamodule=data, ckpt_path=ckpt_path)
    return reader.read


def test_every_pass_reads_every_row_in_an_order_of_its_own():
    batches = read(prompts(), max_epochs=3)
    passes = ["".join(batches[i : i + 4]) for i in (0, 4, 8)]
    assert [sorted(letters) for letters in passes] == [PROMPTS] * 3
    assert len(set(passes)) == 3
    assert [len(batch) for batch in batches] == [3, 3, 3, 1] * 3


def test_without_shuffling_rows_come_as_they_are():
    assert read(prompts(shuffle=False), max_epochs=2) == ["abc", "def", "ghi", "j"] * 2


def test_the_order_depends_on_the_seed_and_not_on_what_was_drawn_before():
    first = read(prompts(), max_epochs=1)
    torch.rand(7)
    assert read(prompts(), max_epochs=1) == first
    assert read(prompts(seed=1), max_epochs=1) != first


def test_the_seed_is_what_seed_everything_set_unless_it_is_given():
    assert PromptDataModule(PROMPTS).seed == 0
    L.seed_everything(7, verbose=False)
    assert PromptDataModule(PROMPTS).seed == 7
    assert PromptDataModule(PROMPTS, seed=3).seed == 3
    assert (run_seed(None), run_seed(0)) == (7, 0)


@pytest.mark.invariant(36)
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used")
@pytest.mark.parametrize(
    ("limit", "checkpoints"),
    [
        ({"max_epochs": 3}, {"every_n_train_steps": 1, "save_on_train_epoch_end": False}),
        ({"max_steps": 11}, {"every_n_train_steps": 1, "save_on_train_epoch_end": False}),
        ({"max_epochs": 3}, {"every_n_epochs": 1}),
        ({"max_steps": 11}, {"every_n_epochs": 1}),
        ({"max_epochs": 3, "limit_train_batches": 2}, {"every_n_train_steps": 1, "save_on_train_epoch_end": False}),
    ],
    ids=["steps, max_epochs", "steps, max_steps", "epochs, max_epochs", "epochs, max_steps", "limited"],
)
def test_a_resumed_run_reads_exactly_what_was_left(tmp_path, limit, checkpoints):
    keep = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, **checkpoints)
    whole = read(prompts(), callbacks=[keep], enable_checkpointing=True, **limit)
    saved = sorted(int(path.stem.removeprefix("step=")) for path in tmp_path.glob("*.ckpt"))
    assert len(saved) >= 2
    for step in saved:
        if step < len(whole):
            rest = read(prompts(), ckpt_path=tmp_path / f"step={step}.ckpt", **limit)
            assert rest == whole[step:], step


def test_a_shortened_pass_ends_early_and_the_next_one_has_its_own_order():
    batches = read(prompts(), max_epochs=2, limit_train_batches=2)
    whole = read(prompts(), max_epochs=2)
    assert batches == whole[:2] + whole[4:6]


def test_another_fit_goes_on_where_the_first_one_stopped():
    whole = read(prompts(), max_epochs=2)
    data = prompts()
    assert read(data, max_epochs=1) + read(data, max_epochs=1) == whole


def test_validation_does_not_move_the_place_in_the_training_data():
    class WithValidation(PromptDataModule):
        def val_dataloader(self):
            items = [self.tokenized(row, number) for number, row in enumerate(self.rows)]
            return DataLoader(items, batch_size=2, collate_fn=self.collate)

    class Validated(Reader):
        def validation_step(self, batch, batch_idx):
            pass

    reader = Validated()
    trainer = bare_trainer(max_epochs=2, num_sanity_val_steps=2, val_check_interval=2)
    trainer.fit(reader, datamodule=prompts(WithValidation))
    assert reader.read == read(prompts(), max_epochs=2)


def test_the_place_is_in_the_state():
    data = prompts()
    read(data, max_steps=6, max_epochs=-1)
    assert data.state_dict() == {"epoch": 1, "position": 2}
    other = prompts()
    other.load_state_dict(data.state_dict())
    assert [batch.prompts for batch in other.train_dataloader()] == [batch.prompts for batch in data.train_dataloader()]


def test_the_loader_is_a_plain_one_whose_sampler_lightning_leaves_in_place():
    loader = prompts().train_dataloader()
    assert type(loader) is DataLoader
    assert isinstance(loader.sampler, DistributedSampler)
    assert len(loader) == 4


def test_other_processes_may_collate():
    assert read(prompts(num_workers=1), max_epochs=2) == read(prompts(), max_epochs=2)


def test_rows_are_tokenised_once():
    calls = []

    class Counting(PromptDataModule):
        def tokenized(self, row, what):
            calls.append(what)
            return super().tokenized(row, what)

    read(prompts(Counting), max_epochs=3)
    assert calls == [f"`prompts[{number}]`" for number in range(10)]


def test_a_loader_before_there_is_a_tokenizer_is_an_error_that_says_what_to_do():
    with pytest.raises(ValueError, match="`tokenizer` is not set: fit with an RLHF module"):
        PromptDataModule(PROMPTS).train_dataloader()


@pytest.mark.parametrize("cls", [PromptDataModule, ConversationDataModule])
def test_a_batch_holds_at_least_a_row(cls):
    with pytest.raises(ValueError, match="`batch_size=0` must be at least 1"):
        cls(PROMPTS, batch_size=0)
