import json
import os

import pytest

from lightning_rlhf import ConversationDataModule, PPOModule, PromptDataModule
from lightning_rlhf.callbacks import RolloutCheckpoint, RolloutWriter
from lightning_rlhf.callbacks.rollout_writer import cut
from tests.networks import word_tokenizer
from tests.training import PROMPTS, Seen, bare_trainer, fit, module_of, sft, share_of_early_letters

ROWS = [
    {"prompt": prompt, "task": task, "id": i} for i, (prompt, task) in enumerate(zip(PROMPTS, "xyxyxy", strict=True))
]


def half(prompts, responses, task):
    """Has nothing to say about task y."""
    return [0.5 if name == "x" else None for name in task]


def written(folder, rank=0):
    return [json.loads(line) for line in (folder / f"rank-{rank}.jsonl").read_text(encoding="utf-8").splitlines()]


def run(folder, iterations=4, batches=None, data=ROWS, **flags):
    """Two updates an iteration."""
    ckpt_path = flags.pop("ckpt_path", None)
    seen = Seen()
    keep = RolloutCheckpoint(folder / "kept", every_n_rollouts=1, save_top_k=-1, save_policy=False)
    callbacks = [RolloutWriter(folder), seen, keep]
    trainer = bare_trainer(max_epochs=iterations, callbacks=callbacks, enable_checkpointing=True, **flags)
    module = module_of(PPOModule, minibatch_size=3, num_epochs=1, kl_coef=0.0, reward=[share_of_early_letters, half])
    trainer.fit(module, datamodule=PromptDataModule(data, batch_size=6), ckpt_path=ckpt_path)
    return seen


def test_a_line_a_response_with_text_ids_scores_and_metadata(tmp_path):
    module = module_of(
        PPOModule, reward=[share_of_early_letters, (half, 2.0)], responses_per_prompt=2, sampling={"max_new_tokens": 9}
    )
    data = PromptDataModule(ROWS, batch_size=6)
    seen = Seen()
    bare_trainer(max_epochs=2, callbacks=[RolloutWriter(tmp_path), seen]).fit(module, datamodule=data)
    lines = written(tmp_path)
    assert [(line["iteration"], line["row"]) for line in lines] == [(i, row) for i in (0, 1) for row in range(12)]
    tokenizer = word_tokenizer()
    for line in lines:
        assert line["prompt"] == PROMPTS[line["metadata"]["id"]]
        assert tokenizer.decode(line["prompt_tokens"]) == line["prompt"]
        assert tokenizer.decode(line["response_tokens"], skip_special_tokens=True) == line["response"]
        early = share_of_early_letters([], [line["response"]])[0]
        applies = line["metadata"]["task"] == "x"
        assert line["scores"]["share_of_early_letters"] == pytest.approx(early)
        assert line["scores"]["half"] == (0.5 if applies else None)
        assert line["scores"]["total"] == pytest.approx(early + applies)
        ended = tokenizer.eos_token_id in line["response_tokens"]
        assert line["truncated"] == (not ended)
        assert "token_scores" not in line
    lengths = seen.experiences[0].response_mask.sum(1).tolist()
    assert [len(line["response_tokens"]) for line in lines[:12]] == lengths
    assert len(set(lengths)) > 2


def test_dense_scores_are_written_per_token(tmp_path):
    def ids(prompts, responses, response_tokens):
        return [[token / 32 for token in tokens.tolist()] for tokens in response_tokens]

    fit(module_of(PPOModule, reward=ids), iterations=1, callbacks=[RolloutWriter(tmp_path)])
    for line in written(tmp_path):
        assert line["token_scores"] == [token / 32 for token in line["response_tokens"]]


def test_chat_messages_and_texts_of_any_alphabet_come_back_as_they_were(tmp_path):
    rows = [{"prompt": "a b", "answer": "größer, 大きい"}, {"prompt": "c", "answer": {"of": [1, None]}}]
    fit(module_of(PPOModule), iterations=1, prompts=rows, callbacks=[RolloutWriter(tmp_path)])
    by_prompt = {line["prompt"]: line["metadata"]["answer"] for line in written(tmp_path)}
    assert by_prompt == {row["prompt"]: row["answer"] for row in rows}


def test_it_writes_every_so_many_iterations(tmp_path):
    fit(module_of(PPOModule), iterations=4, callbacks=[RolloutWriter(tmp_path, every_n_iterations=3)])
    assert {line["iteration"] for line in written(tmp_path)} == {0, 3}


@pytest.mark.invariant(36)
@pytest.mark.parametrize("cut_short", [False, True])
def test_a_resumed_run_leaves_the_file_of_an_uninterrupted_one(tmp_path, cut_short):
    run(tmp_path / "whole")
    run(tmp_path / "killed", max_steps=6)  # three of four iterations
    file = tmp_path / "killed" / "rank-0.jsonl"
    assert len(written(tmp_path / "killed")) == 18
    if cut_short:
        os.truncate(file, file.stat().st_size - 30)
    run(tmp_path / "killed", ckpt_path=tmp_path / "killed" / "kept" / "iteration=2.ckpt")
    assert file.read_bytes() == (tmp_path / "whole" / "rank-0.jsonl").read_bytes()


def test_another_fit_of_the_same_module_goes_on_in_the_file(tmp_path):
    module = module_of(PPOModule)
    for _ in range(2):
        fit(module, iterations=1, callbacks=[RolloutWriter(tmp_path)])
    assert [line["iteration"] for line in written(tmp_path)] == [0] * 6 + [1] * 6


def test_files_of_another_run_are_moved_aside_and_not_lost(tmp_path, monkeypatch):
    warned = []
    monkeypatch.setattr("lightning_rlhf.callbacks.rollout_writer.rank_zero_warn", warned.append)
    fit(module_of(PPOModule), iterations=1, callbacks=[RolloutWriter(tmp_path)])
    first = written(tmp_path)
    for number in (1, 2):
        fit(module_of(PPOModule, seed=number), iterations=1, callbacks=[RolloutWriter(tmp_path)])
        assert warned[-1].endswith(f"rank-0.jsonl of another run, which is now rank-0.jsonl.{number}.")
    assert len(warned) == 2
    assert len(written(tmp_path)) == 6
    assert [json.loads(line) for line in (tmp_path / "rank-0.jsonl.1").read_text().splitlines()] == first


def test_files_of_processes_that_are_no_more_are_cut_as_well(tmp_path):
    run(tmp_path, max_steps=4)
    (tmp_path / "rank-1.jsonl").write_bytes((tmp_path / "rank-0.jsonl").read_bytes())
    (tmp_path / "rank-x.jsonl").touch()
    run(tmp_path, ckpt_path=tmp_path / "kept" / "iteration=1.ckpt")
    assert {line["iteration"] for line in written(tmp_path, rank=1)} == {0}


def test_what_led_to_a_checkpoint_is_on_the_disk_before_it(tmp_path, monkeypatch):
    synced = []

    def sync(descriptor):
        opened = os.fstat(descriptor)
        name = next(path.name for path in [tmp_path, *tmp_path.rglob("*")] if os.path.samestat(opened, path.stat()))
        lines = len((tmp_path / "rank-0.jsonl").read_text().splitlines())
        synced.append((name, lines))

    monkeypatch.setattr(os, "fsync", sync)
    run(tmp_path, iterations=1)
    assert [name for name, _ in synced][:2] == ["rank-0.jsonl", "iteration=1.ckpt.tmp"]
    assert synced[0][1] == 6


def test_it_writes_beside_the_logs_unless_it_is_told_where(tmp_path):
    fit(module_of(PPOModule), iterations=1, callbacks=[RolloutWriter()], default_root_dir=tmp_path)
    assert len(written(tmp_path / "rollouts")) == 6


def test_lines_are_cut_where_an_iteration_begins(tmp_path):
    path = tmp_path / "rank-0.jsonl"
    lines = [json.dumps({"iteration": i}) + "\n" for i in (0, 0, 2, 2, 4)]
    for first, kept in ((5, 5), (4, 4), (3, 4), (2, 2), (0, 0)):
        path.write_text("".join(lines))
        cut(path, first)
        assert path.read_text() == "".join(lines[:kept])
    for left in (1, 5):
        path.write_text("".join(lines)[:-left])
        cut(path, 5)
        assert path.read_text() == "".join(lines[:4])


@pytest.mark.invariant(39)
def test_a_file_that_cannot_be_written_stops_all_processes(tmp_path, monkeypatch):
    told = []

    def agree(error, what, rows, device):
        told.append((type(error), what))
        raise error

    monkeypatch.setattr("lightning_rlhf.callbacks.rollout_writer.agree", agree)
    (tmp_path / "rank-0.jsonl").mkdir()
    monkeypatch.setattr(RolloutWriter, "on_train_start", lambda *args: None)
    with pytest.raises(IsADirectoryError):
        fit(module_of(PPOModule), iterations=1, callbacks=[RolloutWriter(tmp_path)])
    assert told == [(IsADirectoryError, f"`RolloutWriter` in {tmp_path}")]


def test_a_module_that_does_not_roll_out_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`RolloutWriter` writes what a policy wrote, and SFTModule rolls nothing out"):
        bare_trainer(max_epochs=1, callbacks=[RolloutWriter(tmp_path)]).fit(
            sft(), datamodule=ConversationDataModule(["a b c"])
        )


def test_it_cannot_write_every_zero_iterations():
    with pytest.raises(ValueError, match="`every_n_iterations=0` must be at least 1"):
        RolloutWriter(every_n_iterations=0)
