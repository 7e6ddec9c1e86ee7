"""Sources that are read while they are learnt from, and data sets of Hugging Face."""

import random
import re

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_rlhf import ConversationDataModule, PreferenceDataModule, PromptDataModule
from lightning_rlhf.data.cursor import Cursor
from lightning_rlhf.data.streaming import Stream
from lightning_rlhf.data.tokens import Tokenized
from tests.data.test_data_base import PROMPTS, Reader
from tests.networks import word_tokenizer
from tests.training import bare_trainer


class Source:
    """Rows without a length, in an order that depends on the epoch, as a shuffled stream has them."""

    def __init__(self, rows=PROMPTS, seed=0):
        self.rows, self.seed, self.epoch = rows, seed, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        rows = list(self.rows)
        random.Random(self.seed + self.epoch).shuffle(rows)
        yield from rows


class Ordered(Source):
    """In the order given."""

    def __iter__(self):
        yield from self.rows


def read(source, ckpt_path=None, callbacks=(), **flags):
    data = PromptDataModule(source, batch_size=3)
    data.tokenizer = word_tokenizer()
    reader = Reader()
    trainer = bare_trainer(callbacks=list(callbacks), enable_checkpointing=bool(callbacks), **flags)
    trainer.fit(reader, datamodule=data, ckpt_path=ckpt_path)
    return reader.read, data


def test_every_pass_reads_all_of_a_stream_in_the_order_that_it_has():
    batches, data = read(Source(), max_epochs=3)
    passes = ["".join(batches[i : i + 4]) for i in (0, 4, 8)]
    for epoch, letters in enumerate(passes):
        expected = list(PROMPTS)
        random.Random(epoch).shuffle(expected)
        assert letters == "".join(expected)
    assert [len(batch) for batch in batches] == [3, 3, 3, 1] * 3
    assert data.state_dict()["epoch"] == 3


@pytest.mark.invariant(36)
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used")
@pytest.mark.parametrize(
    "limit", [{"max_epochs": 3}, {"max_steps": 11}, {"max_epochs": 3, "limit_train_batches": 2}], ids=str
)
@pytest.mark.parametrize("rows", [PROMPTS, PROMPTS[:9]], ids=["ragged", "even"])
def test_a_resumed_run_reads_exactly_what_was_left_of_a_stream(tmp_path, limit, rows):
    keep = ModelCheckpoint(
        tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=1, save_on_train_epoch_end=False
    )
    whole, _ = read(Source(rows), callbacks=[keep], **limit)
    saved = sorted(int(path.stem.removeprefix("step=")) for path in tmp_path.glob("*.ckpt"))
    assert len(saved) >= 5
    for step in saved:
        if step < len(whole):
            rest, _ = read(Source(rows), ckpt_path=tmp_path / f"step={step}.ckpt", **limit)
            assert rest == whole[step:], step


@pytest.mark.invariant(36)
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used")
@pytest.mark.parametrize(
    ("other", "why"),
    [
        (Source(seed=5), "other rows come before the place at which the run was cut"),
        (Ordered(PROMPTS[:6]), "it has 2 batches, and 2 of them were read before"),
    ],
    ids=["order", "end"],
)
def test_a_stream_that_gives_other_rows_than_before_is_refused(tmp_path, other, why):
    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2)
    read(type(other)(), callbacks=[keep], max_steps=2)
    complaint = f"`prompts`: the stream does not give the rows again that it gave before the run was cut ({why})"
    with pytest.raises(ValueError, match=re.escape(complaint)):
        read(other, ckpt_path=tmp_path / "step=2.ckpt", max_steps=4)


def batches_of(source, cls=PromptDataModule, **arguments):
    data = cls(source, batch_size=2, **arguments)
    data.tokenizer = word_tokenizer()
    return data, list(data.train_dataloader())


def test_a_stream_is_looked_through_while_it_is_read():
    data, batches = batches_of(Ordered(["a", "b b b", "a", "c c"]), deduplicate="exact", max_length=2, too_long="drop")
    assert [batch.prompts for batch in batches] == [["a", "c c"]]
    assert data.dropped == {"prompts": {"duplicate": 1, "row": 1}}
    rows = [{"prompt": "a", "answer": "x"}, {"prompt": "b", "level": 1}, "c"]
    _, batches = batches_of(Ordered(rows))
    assert [batch.metadata for batch in batches] == [{"answer": ["x", None], "level": [None, 1]}, {}]


def test_preferences_and_texts_may_be_streams_too():
    pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
    _, (batch,) = batches_of(Ordered([pair, {**pair, "prompt": "d"}]), PreferenceDataModule)
    assert batch.prompt_tokens.tolist() == [[0], [3]]
    _, (batch,) = batches_of(Ordered(["a b"]), ConversationDataModule)
    assert batch.prompt_tokens.tolist() == [[0]]


def test_a_row_of_a_stream_is_named_when_it_is_read():
    with pytest.raises(ValueError, match=r"`prompts\[1\]` has no key 'prompt'"):
        batches_of(Ordered(["a", {"text": "b"}]))


def test_what_is_held_out_is_read_to_its_end():
    data = PromptDataModule(Ordered(["a"]), validation=Ordered(["b", "c"]))
    assert data.held_out["validation"] == [{"prompt": "b"}, {"prompt": "c"}]


@pytest.mark.parametrize(
    ("cls", "arguments", "complaint"),
    [
        (PromptDataModule, {"num_workers": 2}, "`num_workers=2`: `prompts` is a stream, which each would read"),
        (PromptDataModule, {"validation_share": 0.5}, "`validation_share=0.5` needs all rows of `prompts` at once"),
        (ConversationDataModule, {"batch_tokens": 8}, "`batch_tokens=8` looks at all rows at once, which a stream has"),
    ],
)
def test_what_needs_all_rows_is_refused(cls, arguments, complaint):
    with pytest.raises(ValueError, match=re.escape(complaint)):
        cls(Ordered(["a"]), **arguments)


@pytest.mark.parametrize("rows", [[], ["a a a"]])
def test_a_stream_without_rows_is_an_error(rows):
    with pytest.raises(ValueError, match="`prompts` is empty, or all its rows are left out"):
        batches_of(Ordered(rows), max_length=2, too_long="drop")


def of_ranks(rows, world_size, position=0, batch_size=2):
    """What every rank reads, from a batch on."""

    def tokenized(source):
        return (Tokenized([row], [], row) for row in source)

    streams = [Stream(rows, "rows") for _ in range(world_size)]
    for rank, stream in enumerate(streams):
        stream.begin(tokenized, Cursor(0, position), batch_size, world_size, rank)
    return [[item.row for item in stream] for stream in streams], streams


@pytest.mark.invariant(37)
@pytest.mark.parametrize("count", [1, 2, 5, 6, 7])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_share_a_stream_as_they_share_a_list(count, world_size):
    dealt, streams = of_ranks(range(count), world_size)
    lines = -(-count // world_size)
    expected = [j % count for j in range(lines * world_size)]
    assert dealt == [expected[rank::world_size] for rank in range(world_size)]
    assert {stream.batches for stream in streams} == {-(-lines // 2)}
    for position in range(-(-lines // 2)):  # after a pass all of them are known
        (digest,) = {stream.digest(position) for stream in streams}
        assert digest is not None
    if lines > 2:
        assert of_ranks(range(count), world_size, position=1)[0] == [rows[2:] for rows in dealt]


# --- Hugging Face -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def datasets():
    """The library, which nothing of ours imports."""
    return pytest.importorskip("datasets", reason="`datasets` is not installed: its objects are not tried")


def test_a_data_set_of_hugging_face_is_read_like_a_list(datasets):
    rows = [{"prompt": letter, "level": n} for n, letter in enumerate(PROMPTS)]
    data = PromptDataModule(datasets.Dataset.from_list(rows), validation_share=0.2)
    assert sorted(data.rows + data.held_out["validation"], key=lambda row: row["level"]) == rows
    with pytest.raises(TypeError, match="of a data set with several splits, one of them"):
        PromptDataModule(datasets.DatasetDict(train=datasets.Dataset.from_list(rows)))


@pytest.mark.invariant(36)
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used")
def test_a_shuffled_stream_of_hugging_face_is_resumed_exactly(datasets, tmp_path):
    def source():
        rows = datasets.Dataset.from_list([{"prompt": letter} for letter in PROMPTS])
        return rows.to_iterable_dataset(num_shards=2).shuffle(seed=3, buffer_size=4)

    keep = ModelCheckpoint(
        tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=1, save_on_train_epoch_end=False
    )
    whole, _ = read(source(), callbacks=[keep], max_epochs=2)
    assert [sorted("".join(whole[i : i + 4])) for i in (0, 4)] == [PROMPTS, PROMPTS]
    assert whole[:4] != whole[4:]
    for step in (2, 4, 7):
        rest, _ = read(source(), ckpt_path=tmp_path / f"step={step}.ckpt", max_epochs=2)
        assert rest == whole[step:]
