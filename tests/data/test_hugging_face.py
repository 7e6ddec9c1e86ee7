"""Data sets by address."""

import sys

import pytest

from lightning_rlhf import PromptDataModule
from lightning_rlhf.data.streaming import Stream

datasets = pytest.importorskip("datasets")
ADDRESS = "hf://datasets/owner/name"


@pytest.fixture
def saved(tmp_path):
    rows = datasets.Dataset.from_list([{"prompt": "a", "source": 1}, {"prompt": "b", "source": 2}])
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": rows, "test": rows.select([1])}).save_to_disk(tmp_path / "two")
    return tmp_path


@pytest.fixture
def hub(monkeypatch):
    """What the hub would be asked for, and what it gives."""
    asked = []
    rows = datasets.Dataset.from_list([{"prompt": "a"}])

    def load(path, **options):
        asked.append((path, options))
        if path == "owner/missing":
            raise datasets.exceptions.DatasetNotFoundError("Dataset 'owner/missing' doesn't exist on the Hub")
        if options.get("streaming"):
            return rows.to_iterable_dataset()
        return rows if "split" in options else datasets.DatasetDict({"train": rows, "test": rows})

    monkeypatch.setattr(datasets, "load_dataset", load)
    return asked


def test_a_folder_that_was_saved_is_read(saved):
    assert PromptDataModule(saved / "one").rows == [{"prompt": "a", "source": 1}, {"prompt": "b", "source": 2}]
    assert PromptDataModule(str(saved / "two?split=test")).rows == [{"prompt": "b", "source": 2}]


@pytest.mark.parametrize(
    ("address", "complaint"),
    [
        ("two", "has the splits 'train', 'test': name one of them, as '.split=train'"),
        ("two?split=dev", "has the splits 'train', 'test': name one"),
        ("one?split=train", "is one split alone: leave '.split=train' out"),
        ("one?streaming=true", "says 'streaming', which must be one of 'split'"),
    ],
)
def test_a_folder_that_says_not_what_is_meant_is_refused(saved, address, complaint):
    with pytest.raises(ValueError, match=f"^`prompts='.*{complaint}"):
        PromptDataModule(str(saved / address))


def test_a_folder_of_something_else_is_refused(saved):
    with pytest.raises(FileNotFoundError, match="there is no such file, but a folder, in which no `save_to_disk`"):
        PromptDataModule(str(saved))


def test_a_folder_that_is_damaged_is_refused(saved):
    (saved / "one" / "state.json").unlink()
    with pytest.raises(ValueError, match=r"^`prompts=.*one'` cannot be loaded \(FileNotFoundError: "):
        PromptDataModule(str(saved / "one"))


def test_the_hub_is_asked_for_what_the_address_says(hub):
    assert PromptDataModule(f"{ADDRESS}?split=train").rows == [{"prompt": "a"}]
    PromptDataModule(f"{ADDRESS}@abc?split=test&name=english&data_files=x/*.json&data_dir=x")
    assert hub == [
        ("owner/name", {"revision": None, "split": "train"}),
        (
            "owner/name",
            {"revision": "abc", "split": "test", "name": "english", "data_files": "x/*.json", "data_dir": "x"},
        ),
    ]


def test_a_data_set_of_the_hub_can_be_streamed(hub):
    assert isinstance(PromptDataModule(f"{ADDRESS}?split=train&streaming=true").rows, Stream)
    assert not isinstance(PromptDataModule(f"{ADDRESS}?split=train&streaming=False").rows, Stream)
    assert [options["streaming"] for _, options in hub] == [True, False]


@pytest.mark.parametrize(
    ("address", "complaint"),
    [
        (ADDRESS, "has the splits 'train', 'test': name one of them"),
        (
            "hf://datasets/owner/missing?split=train",
            r"cannot be loaded \(DatasetNotFoundError: Dataset 'owner/missing'",
        ),
        (f"{ADDRESS}?part=train", "says 'part', which must be one of 'split', 'name'"),
        (f"{ADDRESS}?split=train&streaming=yes", "`streaming=yes` must be true or false"),
    ],
)
def test_an_address_that_is_not_understood_is_refused(hub, address, complaint):
    with pytest.raises(ValueError, match=f"^`prompts='hf://.*{complaint}"):
        PromptDataModule(address)


def test_what_reads_them_is_named_where_it_is_missing(saved, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"one'` is read by datasets: `pip install lightning-rlhf\[datasets\]`"):
        PromptDataModule(str(saved / "one"))


def test_splits_are_added_and_several_files_named(hub):
    PromptDataModule(f"{ADDRESS}?split=train+test[:10%]")
    assert hub.pop()[1]["split"] == "train+test[:10%]"
    PromptDataModule(f"{ADDRESS}?split=train&data_files=a.json&data_files=b.json")
    assert hub.pop()[1]["data_files"] == ["a.json", "b.json"]
    PromptDataModule(f"{ADDRESS}?split=train&data_files=a.json")
    assert hub.pop()[1]["data_files"] == "a.json"
    with pytest.raises(ValueError, match="^`prompts='hf://.*says 'split' twice: say it once"):
        PromptDataModule(f"{ADDRESS}?split=train&split=test")
