"""The three stages of the film reviews, on a handful of made-up ones."""

import csv
import re
from pathlib import Path

import pytest

from lightning_rlhf.cli import main
from lightning_rlhf.examples.film_reviews.__main__ import main as example
from lightning_rlhf.examples.film_reviews.reviews import Reviews, installed, read
from lightning_rlhf.examples.film_reviews.task import OPENING, FilmReviews, lexicon_score, rows_of

ROOT = Path(__file__).parents[2]
FOLDER = Path("outputs/film_reviews")
LIMITS = ["limit_train_batches=1", "limit_val_batches=1", "max_epochs=1", "num_sanity_val_steps=0", "devices=1"]
LIMITS += ["accelerator=cpu", "val_check_interval=1.0", "enable_progress_bar=false", "enable_model_summary=false"]


def some_reviews(count=12):
    return Reviews(*([f"a {kind} film about number {i} ." for i in range(count)] for kind in ("fine", "dull")))


def file_of(path, source="rotten_tomatoes", break_=" "):
    reviews = some_reviews()
    with open(path, "w", encoding="utf-8", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(["text", "label", "source"])
        for texts, label in ((reviews.positive, "1"), (reviews.negative, "neg"), (reviews.positive[:3], "Positive")):
            lines.writerows((text.replace(" ", break_, 1), label, source) for text in texts)
        lines.writerow(["a long one of another source", 1, "another"])
    return path


@pytest.mark.parametrize("source", ["rotten_tomatoes", "imdb"])
def test_reviews_of_one_source_are_read_once_each_with_what_they_say(source, tmp_path):
    assert read(file_of(tmp_path / "reviews.csv", source, "<br /><br />"), source) == some_reviews()


def test_what_is_not_installed_is_said():
    with pytest.raises(ModuleNotFoundError, match="`no_such_reviews` is not installed: pip install it"):
        installed("no_such_reviews", "pip install it")


def test_no_stage_learns_from_what_is_held_out():
    films = FilmReviews(some_reviews(), held_out=3)
    kept, held_out = films.texts(), films.texts(held_out=True)
    assert len(kept) == 18
    assert len(held_out) == 6
    assert {row["text"] for row in kept}.isdisjoint(row["text"] for row in held_out)
    for rows, texts in ((films.comparisons(), kept), (films.comparisons(held_out=True), held_out)):
        assert all("fine" in row["chosen"] and "dull" in row["rejected"] for row in rows)
        both = [row["prompt"] + row[key] for row in rows for key in ("chosen", "rejected")]
        assert sorted(both) == sorted(row["text"] for row in texts)
    (row,) = films.prompts(1, words=2)
    assert any(text["text"].startswith(row["prompt"]) for text in kept)
    assert len(row["prompt"].split()) == 3


def test_the_lexicon_knows_praise():
    praised, damned = lexicon_score([OPENING, OPENING], [" a great , wonderful film", " a terrible , boring film"])[
        "lexicon"
    ]
    assert praised > 0.5
    assert damned < -0.3


def commands():
    """What the README says, in its order, but for the page, which another test opens."""
    section = (
        (ROOT / "README.md").read_text(encoding="utf-8").split("## Three stages on film reviews")[1].split("\n## ")[0]
    )
    return re.findall(r"^    (lightning-rlhf fit|python -m lightning_rlhf.examples.film_reviews) (.+)$", section, re.M)


@pytest.mark.filterwarnings("ignore:The number of training batches")
def test_the_commands_of_the_readme_run_in_their_order(tmp_path, monkeypatch, capsys):
    found = commands()
    assert [arguments for _, arguments in found] == [
        "prepare",
        *(f"--config examples/film_reviews/{stage}.yaml" for stage in ("sft", "reward", "ppo")),
        "compare",
    ]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    path = file_of(tmp_path / "reviews.csv")
    for program, arguments in found:
        if program == "lightning-rlhf fit":
            main(["fit", *arguments.split(), *(f"--trainer.{limit}" for limit in LIMITS)])
        else:
            example([*arguments.split(), "--reviews", str(path), "--held-out", "4", "--prompts", "64"])
    for folder in ("writer", "judge", "policy"):
        assert (FOLDER / folder / "config.json").is_file()
    assert len(list(rows_of(FOLDER / "prompts.jsonl"))) == 64
    printed = capsys.readouterr().out
    assert "before: imitation" in printed
    assert "after: PPO" in printed
