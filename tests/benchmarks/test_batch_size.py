"""Updates of batches of several sizes are compared token by token, and by what they add to the networks' memory."""

import io
import json

import pytest

from benchmarks import batch_size, ours, sizes, workload
from benchmarks.alternation import Result
from benchmarks.batch_size import Growth
from benchmarks.sizes import Size
from benchmarks.worker import Gate
from benchmarks.workload import Case


def growth(batch, seconds, gib, tokens=50):
    case = Case("ppo", "small", "full", "", 2, 4, batch=batch, micro_batch_size=8)
    rows = [[tokens - 20, 20]] * batch
    iterations = [
        {"seconds": 99.0, "optimise": s, "update_gib": g, "rows": rows} for s, g in zip(seconds, gib, strict=True)
    ]
    return Growth(Result("ours_memory", case, iterations))


def test_time_counts_per_token_and_memory_at_its_peak():
    small, large = growth(8, [4.0, 2.0, 3.0], [0.5, 1.0, 0.7]), growth(32, [14.0, 12.0, 13.0], [1.1, 1.0, 0.8])
    assert small.per_token == pytest.approx(1000 * 3.0 / 400)
    assert large.over(small) == pytest.approx((13.0 / 1600 / (3.0 / 400), 1.1))
    line = dict(zip(batch_size.HEADINGS[:4], large.line(small), strict=False))
    assert list(line.values()) == ["32", "1600", "13.00 (12.00 to 14.00)", "8.125"]


def test_the_verdict_says_what_grows_beyond_fifteen_percent():
    small = growth(8, [2.0], [1.0])
    assert batch_size.verdict([small, growth(16, [4.0], [1.15])]).startswith("Within 15 %")
    wide = batch_size.verdict([small, growth(16, [4.0], [1.16]), growth(32, [8.0], [1.0])])
    slow = batch_size.verdict([small, growth(16, [4.7], [1.0])])
    assert all(verdict.startswith("NOT within 15 % of the smallest batch") for verdict in (wide, slow))
    assert "1.00 times its time per token, and 1.16 times its memory" in wide
    assert "1.18 times its time per token, and 1.00 times its memory" in slow


@pytest.mark.parametrize(
    "arguments",
    [
        ["--batches", "12"],
        ["--micro-batch-size", "4", "--micro-batch-tokens", "9"],
        ["--micro-batch-size", "0"],
        ["--micro-batch-tokens", "-1"],
        ["--iterations", "0"],
    ],
)
def test_what_cannot_be_measured_is_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        batch_size.parsed(arguments)
    assert arguments[0] in capsys.readouterr().err.splitlines()[-1]  # above it all options are listed


def test_pieces_are_of_eight_responses_or_of_so_many_tokens():
    options = batch_size.parsed([])
    assert (options.micro_batch_size, options.micro_batch_tokens) == (8, None)
    options = batch_size.parsed(["--micro-batch-tokens", "900"])
    assert (options.micro_batch_size, options.micro_batch_tokens) == (None, 900)


@pytest.mark.parametrize(
    ("args", "name", "piece"),
    [([], "ppo-small-full", "8 responses"), (["--micro-batch-tokens", "900"], "ppo-small-full-tokens", "900 tokens")],
)
def test_every_batch_is_measured_by_itself_and_the_page_says_how(args, name, piece, tmp_path, monkeypatch, capsys):
    cases = []

    def measured(entrants, count, attempts, *_):
        ((system, case),) = [(entrant.system, entrant.case) for entrant in entrants]
        assert (system, count, attempts, case.iterations) == ("ours_memory", 2, 6, 8)
        cases.append(case)
        return [growth(case.batch, [case.batch / 8.0] * 2, [1.0] * 2).result]

    monkeypatch.setattr(batch_size, "measure", measured)
    monkeypatch.setattr(workload, "save", lambda *_: None)
    shared = ["--batches", "16", "8", "--iterations", "2", "--output", str(tmp_path)]
    batch_size.main([*args, *shared])
    assert [case.batch for case in cases] == [8, 16]
    assert {(c.micro_batch_size, c.micro_batch_tokens) for c in cases} == {(0, 900) if args else (8, 0)}
    page = (tmp_path / f"{name}.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in page[2:4]] == ["| 8", "| 16"]
    assert page[5] == f"`python -m benchmarks.batch_size {' '.join([*args, *shared])}`"
    assert f"{piece} of a batch at a time" in page[6]
    assert page[7] in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("pieces", [{"micro_batch_size": 8}, {"micro_batch_tokens": 900}])
def test_a_batch_of_any_size_is_one_step_in_micro_batches(pieces, tmp_path, monkeypatch):
    monkeypatch.setattr(ours, "quiet", lambda: None)  # it would silence Lightning's loggers for the other tests as well
    monkeypatch.setitem(sizes.SIZES, "tiny", Size(16, 2, 2, 64))
    workload.save(tmp_path, sizes.SIZES["tiny"], "full")
    made, updates = ours.module_of, []

    def watched(case):
        module = made(case)
        update = module.update
        module.update = lambda minibatch: (updates.append(len(minibatch.micro_batches)), update(minibatch))
        return module

    reward = workload.reward

    def greedy(*args):
        block = bytearray(2**30)  # before the updates, whose peak this is not
        block[::4096] = b"x" * len(block[::4096])
        return reward(*args)

    monkeypatch.setattr(workload, "reward", greedy)
    monkeypatch.setattr(ours, "module_of", watched)
    replies = io.StringIO()
    case = Case("ppo", "tiny", "full", str(tmp_path), 1, 2, batch=24, **pieces)
    with pytest.raises(SystemExit):
        batch_size.online(case, Gate(io.StringIO("stop\n"), replies))
    reply = json.loads(replies.getvalue())
    assert len(updates) == 4  # epochs
    assert all(count >= 3 for count in updates)  # 24 responses of 64 tokens, and their prompts
    assert len(reply["rows"]) == 24
    assert 0 < reply["optimise"] < reply["seconds"]
    assert 0 <= reply["update_gib"] < 0.5
