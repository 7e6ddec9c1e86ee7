"""What a policy writes while it is validated."""

import functools

import pytest
import torch
from lightning.pytorch.loggers import Logger

from lightning_rlhf import ConversationDataModule, SFTModule
from lightning_rlhf.callbacks import ValidationSamples, validation_samples
from lightning_rlhf.models.reference import fingerprint
from tests.networks import ENCODER_DECODERS, POSITIONS, network, tiny_gpt2, word_tokenizer
from tests.training import bare_trainer

ROWS = [{"prompt": "a", "response": "f e d"}, {"prompt": "b b", "response": "g"}, {"prompt": "c", "response": "h h i"}]


class Tables(Logger):
    """Keeps the tables that it is given."""

    name, version = "tables", 0

    def __init__(self):
        super().__init__()
        self.tables = []

    def log_hyperparams(self, *args, **kwargs):
        pass

    def log_metrics(self, metrics, step=None):
        pass

    def log_table(self, key, columns, data, step):
        self.tables.append((key, columns, data, step))


def run(callbacks, policy=None, rows=ROWS, validation=ROWS, epochs=2, **arguments):
    optimizer = functools.partial(torch.optim.AdamW, lr=1e-2)
    module = SFTModule(
        policy or tiny_gpt2(layers=1, width=32), tokenizer=word_tokenizer(), optimizer=optimizer, seed=0, **arguments
    )
    logger = Tables()
    data = ConversationDataModule(rows, validation=validation, batch_size=3, seed=0)
    bare_trainer(max_epochs=epochs, check_val_every_n_epoch=epochs // 2, callbacks=callbacks, logger=logger).fit(
        module, datamodule=data
    )
    return module, logger.tables


def test_every_validation_shows_what_is_written_and_what_the_data_has(capsys):
    callback = ValidationSamples(num_rows=2)
    greedy = {"temperature": 0, "max_new_tokens": 8}
    _, tables = run([callback], evaluation_sampling=greedy, epochs=40)
    assert [step for *_, step in tables] == [20, 40]  # and none of the sanity check
    key, columns, rows, _ = tables[-1]
    assert (key, columns) == ("samples", ["prompt", "response", "data"])
    assert rows == [["a", "f e d", "f e d"], ["b b", "g", "g"]]
    assert "Samples after 40 updates" in capsys.readouterr().out


def test_training_is_the_same_with_and_without_and_chance_is_that_of_evaluation():
    sampled = {"max_new_tokens": 5}
    (one, tables), (other, _) = (
        run(callbacks, evaluation_sampling=sampled) for callbacks in ([ValidationSamples(console=False)], [])
    )
    assert fingerprint(one.policy) == fingerprint(other.policy)
    again = run([ValidationSamples(console=False)], evaluation_sampling=sampled)[1]
    assert again == tables
    assert len(tables[0][2]) == 3  # there are no four


def test_a_response_has_the_room_that_the_prompt_leaves():
    rows = [{"prompt": "a " * (POSITIONS - 3), "response": "b"}]
    _, tables = run([ValidationSamples(console=False)], rows=rows, validation=rows)
    assert all(len(row[1].split()) <= 3 for _, _, data, _ in tables for row in data)


def test_no_process_writes_more_than_the_longest_prompt_of_all_leaves_room_for(monkeypatch):
    """Or one that gathers weights for every token would wait for one that has no room left."""
    monkeypatch.setattr(validation_samples, "most_over_ranks", lambda width, device: max(width, POSITIONS - 2))
    _, tables = run([ValidationSamples(console=False)], evaluation_sampling={"max_new_tokens": 8, "min_new_tokens": 8})
    assert {len(row[1].split()) for _, _, data, _ in tables for row in data} == {2}


def test_an_encoder_decoder_is_shown_too(capsys):
    _, tables = run([ValidationSamples(num_rows=1, console=False)], network(ENCODER_DECODERS["t5"]()))
    assert [len(data) for _, _, data, _ in tables] == [1, 1]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("argument", ["num_rows", "max_characters"])
def test_a_table_of_nothing_is_refused(argument):
    with pytest.raises(ValueError, match=f"`{argument}=0` must be at least 1"):
        ValidationSamples(**{argument: 0})
