"""Letters in order: the task, the command, and that a T5 and a BART learn it."""

import pytest
import yaml
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from lightning_rlhf import SFTModule
from lightning_rlhf.examples.seq2seq import task
from lightning_rlhf.examples.seq2seq.__main__ import main
from lightning_rlhf.examples.seq2seq.training import evaluate, learn, warm_start
from tests.examples.test_yamls import EXAMPLES


def test_words_are_scored_by_letters_in_their_place():
    assert task.score(["dacb"] * 5, ["abcd", "abdc", "abcdd", "abc", ""]) == [1.0, 0.5, 0.8, 0.75, 0.0]
    assert task.measure(["dacb", "aa"], ["abcd", "a"]) == {"exact": [1.0, 0.0]}


def test_words_that_are_learnt_from_are_not_those_that_are_measured():
    imitated, learnt, unseen = (set(task.words(n, seed)) for n, seed in ((4000, 1), (5120, 2), (200, 3)))
    assert {len(word) for word in unseen} == {4, 5, 6, 7, 8}
    # Of words of four letters there are few enough to come twice.
    assert len(unseen & (imitated | learnt)) < 5


@pytest.mark.parametrize("model", task.MODELS)
def test_the_tokenizer_goes_with_the_networks(model):
    tokenizer, config = task.tokenizer(), task.MODELS[model]()
    assert tokenizer("ab")["input_ids"] == [0, 1, config.eos_token_id]
    assert (config.eos_token_id, config.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert len(tokenizer) == config.vocab_size
    assert tokenizer.decode([2, 0, config.eos_token_id], skip_special_tokens=True) == "ca"


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_the_command_leaves_a_table_a_curve_and_a_policy(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(task, "LEARNT", 64)
    main(["--model", "bart", "--epochs", "1", "--iterations", "2", "--output", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "200 unseen words, bart" in printed
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "policy")
    assert model.config.dropout == 0.1
    tokens = AutoTokenizer.from_pretrained(tmp_path / "policy")(
        ["ba"], return_tensors="pt", return_token_type_ids=False
    )
    assert model.generate(**tokens, max_new_tokens=3).shape[0] == 1


def test_the_yamls_are_the_stages_of_the_command():
    imitation, ppo = (
        yaml.safe_load((EXAMPLES / "seq2seq" / f"{name}.yaml").read_text())["model"]["init_args"]
        for name in ("sft", "ppo")
    )
    source = (EXAMPLES / "seq2seq" / "training.py").read_text()
    assert f"lr={imitation['optimizer']['init_args']['lr']:g}".replace("0.002", "2e-3") in source
    assert f"lr={ppo['optimizer']['init_args']['lr']:g}".replace("0.001", "1e-3") in source
    assert f"minibatch_size={ppo['minibatch_size']}" in source


@pytest.mark.slow
@pytest.mark.parametrize(("model", "floor"), [("t5", 0.9), ("bart", 0.9)])
def test_an_encoder_decoder_learns_by_imitation_and_then_from_a_score(model, floor, tmp_path):
    quiet = {"enable_progress_bar": False}
    warm_start(model, tmp_path, seed=0, **quiet)
    before = evaluate(SFTModule(tmp_path))
    module, curve = learn(tmp_path, seed=0, logger=False, **quiet)
    after = evaluate(module)
    assert after[0] >= floor
    assert after[0] > before[0] + 0.05
    assert after[1] > before[1] + 0.1
