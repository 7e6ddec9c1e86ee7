"""Who is measured, who waits, and which iterations count."""

import io
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from subprocess import PIPE, Popen, TimeoutExpired
from types import SimpleNamespace

import pytest
import torch

from benchmarks import environments, ours, sizes, speed, tables
from benchmarks.alternation import ROOT, Entrant, Result, chosen, measure
from benchmarks.machine import Clock, MatrixRate, best, better, forget_peak, matrix_rates, memory_now, peak_memory
from benchmarks.sizes import SIZES
from benchmarks.useful import work
from benchmarks.worker import Gate, run_of
from benchmarks.workload import Case, save
from lightning_rlhf.functional.linear import suits

CASE = Case("ppo", "small", "full", "", 1, 4)


def iteration(seconds=1.0, others=0.0, rows=((10, 5),), **phases):
    return {"seconds": seconds, "others": others, "rows": rows, "peak": 1.0, "versions": {"torch": "2"}, **phases}


def proc(folder: Path, busy: list[int], own: list[int]) -> Path:
    """A folder as Linux has it, in seconds: user, nice, system, idle, waiting, irq, softirq, steal; user and system."""
    (folder / "7").mkdir(parents=True, exist_ok=True)
    (folder / "stat").write_text("cpu  " + " ".join(str(100 * s) for s in busy) + " 0 0\ncpu0 1 2 3\n")
    fields = ["S", *["0"] * 10, *(str(100 * s) for s in own), *["0"] * 30]
    (folder / "7" / "stat").write_text(f"7 (a name) with ) {' '.join(fields)}\n")
    return folder


def test_others_are_what_the_cores_did_less_the_process_and_idling_is_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.machine._TICKS", 100)
    before = Clock.read(7, proc(tmp_path, [10, 0, 5, 100, 9, 0, 0, 1], [3, 1]))
    after = Clock.read(7, proc(tmp_path, [30, 1, 6, 900, 99, 0, 0, 2], [20, 2]))
    after = Clock(before.wall + 10.0, after.busy, after.own)
    assert after.others_since(before) == pytest.approx((20 + 1 + 1 + 1 - 18) / 10)


def test_where_nothing_is_known_of_others_nobody_is_in_the_way(tmp_path):
    assert Clock.read(7, tmp_path).others_since(Clock.read(7, tmp_path)) == 0.0


def test_the_memory_is_this_process_s_own_peak():
    before = peak_memory()
    block = bytearray(200 * 2**20)
    block[::4096] = b"x" * len(block[::4096])
    assert peak_memory() >= max(before, 0.2)
    del block


def test_a_peak_that_was_forgotten_is_no_more_than_what_is_held_now():
    block = bytearray(100 * 2**20)
    block[::4096] = b"x" * len(block[::4096])
    held = memory_now()
    del block
    assert peak_memory() >= held
    forget_peak()
    assert peak_memory() <= held - 0.09
    assert memory_now() <= peak_memory() + 1e-3


def test_a_matrix_rate_is_two_operations_per_multiplication(monkeypatch):
    product = SimpleNamespace(slept=lambda x, weight: time.sleep(0.05))
    monkeypatch.setattr("benchmarks.machine.BACKENDS", {"MKL": product.slept})
    (rate,) = matrix_rates(1, repeats=2, shapes=[(10, 20, 30), (1000, 2000, 50)]).values()
    assert rate.shape == (1000, 2000, 50)
    assert rate.gflops == pytest.approx(2 * 1000 * 2000 * 50 / 0.05 / 1e9, rel=0.2)
    assert str(rate).endswith("GFLOP/s (1000 x 2000 x 50)")


def test_torch_and_onednn_are_both_asked_for_their_best_product():
    rates = matrix_rates(1, repeats=2, shapes=[(64, 64, 64)])
    assert list(rates) == ["MKL", "oneDNN"]
    assert all(0.01 < rate.gflops < 5000 for rate in rates.values())


def test_the_best_of_several_measurements_counts_backend_by_backend():
    first = {"MKL": MatrixRate("MKL", 3.0, (1, 1, 1)), "oneDNN": MatrixRate("oneDNN", 4.0, (1, 1, 1))}
    second = {"MKL": MatrixRate("MKL", 2.0, (2, 2, 2)), "oneDNN": MatrixRate("oneDNN", 5.0, (2, 2, 2))}
    found = better(first, second)
    assert found == {"MKL": first["MKL"], "oneDNN": second["oneDNN"]}
    assert best(found) == 5.0


def test_disturbed_iterations_do_not_count():
    made = [iteration(1), iteration(9, others=0.9), iteration(2), iteration(3), iteration(4)]
    result = chosen(Result("ours", CASE), made, count=3, others_allowed=0.25)
    assert (result.seconds(), result.dropped, result.disturbed) == ([1, 2, 3], 1, 0)


def test_on_a_machine_that_is_never_quiet_the_least_disturbed_count_and_it_is_said():
    made = [iteration(1, others=1.5), iteration(2, others=0.3), iteration(3), iteration(4, others=0.8)]
    result = chosen(Result("ours", CASE), made, count=3, others_allowed=0.25)
    assert (result.seconds(), result.dropped, result.disturbed) == ([3, 2, 4], 1, 2)


def test_a_gate_waits_to_be_told_and_times_only_what_lies_between():
    class Told(io.StringIO):
        def readline(self):
            time.sleep(0.3)  # the others' turn
            return super().readline()

    replies = io.StringIO()
    gate = Gate(Told("go\nstop\n"), replies)
    toy = SimpleNamespace(work=lambda seconds: time.sleep(seconds) or "done")
    seen = []
    gate.timed(toy, "work", "generate", lambda result, seconds: seen.append((result, seconds)))
    toy.work(0.2)
    gate.wait([(1, 2)])
    toy.work(0.02)
    toy.work(0.03)
    with pytest.raises(SystemExit):
        gate.wait([(3, 4)], score=5.0)
    first, second = map(json.loads, replies.getvalue().splitlines())
    assert seen == [("done", 0.2), ("done", 0.02), ("done", 0.03)]
    assert second["generate"] == pytest.approx(0.05, abs=0.1)
    assert second["seconds"] < 0.25
    assert (first["rows"], second["rows"], second["score"]) == ([[1, 2]], [[3, 4]], 5.0)
    assert second["versions"].keys() >= {"python", "torch", "transformers", "lightning"}


BUSY = """
import sys, time, types
from benchmarks import worker

def busy(case, gate):
    gate.wait([])
    gate.wait([])
    time.sleep(600)

sys.modules["busy"] = types.SimpleNamespace(RUNS={"ppo": busy})
worker.SYSTEMS["busy"] = "busy"
worker.main()
"""


def test_a_worker_whose_parent_is_gone_ends_in_the_middle_of_an_iteration():
    command = [sys.executable, "-c", BUSY, "busy", json.dumps(asdict(CASE))]
    with Popen(command, stdin=PIPE, stdout=PIPE, text=True, cwd=ROOT) as process:
        for _ in range(2):
            assert json.loads(process.stdout.readline())["rows"] == []
            process.stdin.write("go\n")
            process.stdin.flush()
        try:
            with pytest.raises(TimeoutExpired):
                process.wait(0.5)
            process.stdin.close()
            assert process.wait(30) == 1
        finally:
            process.kill()


def test_the_share_of_the_matrix_rate_is_useful_work_over_time():
    result = Result("ours", CASE, [iteration(2.0, generate=0.5)])
    useful = work(CASE, "ours", [(10, 5)])
    assert result.share(100.0) == pytest.approx(sum(useful.values()) / 2.0 / 100.0)
    assert result.share(100.0, "generate") == pytest.approx(useful["generate"] / 0.5 / 100.0)
    assert result.share(100.0, "score") is None


def test_a_row_of_the_table_says_how_much_faster_and_leaves_out_the_reward_network_once():
    ours = Result("ours", CASE, [iteration(2.0), iteration(4.0), iteration(3.0)])
    trl = Result("trl", CASE, [iteration(9.0, reward_model=1.5)], dropped=2)
    lines = [dict(zip(tables.HEADINGS, line, strict=True)) for line in tables.lines_of([ours, trl], 100.0)]
    assert [line["system"] for line in lines] == ["ours", "trl", "trl, no reward network"]
    assert lines[0]["seconds (min to max)"] == "3.00 (2.00 to 4.00)"
    assert [line["times as fast"] for line in lines] == ["3.00", "1.00", "1.20"]
    assert lines[1]["iterations"] == "1, 2 dropped"
    table = tables.markdown_table([tables.HEADINGS, *map(dict.values, lines)], ["A fact."])
    assert len(table.splitlines()) == 2 + 3 + 2
    facts = tables.facts_of([[ours, trl]], {"MKL": MatrixRate("MKL", 3.0, (1, 2, 3))}, 2, "python it.py")
    assert facts[0] == "`python it.py`"
    assert "2 threads" in facts[1]
    assert "MKL 3 GFLOP/s (1 x 2 x 3)" in facts[1]
    assert "ours is 2.50 times as fast as trl without" in facts[2]


def test_systems_that_pack_in_their_own_way_are_compared_by_real_tokens():
    case = Case("sft_packed", "small", "full", "", 1, 4)
    ours = Result("ours", case, [iteration(2.0, rows=[(40, 60), (50, 50)]), iteration(1.0, rows=[(20, 30)])])
    trl = Result("trl", case, [iteration(4.0, rows=[(40, 60)])])
    first, second = (dict(zip(tables.HEADINGS, line, strict=True)) for line in tables.lines_of([ours, trl], 100.0))
    assert (first["tokens/s"], second["tokens/s"]) == ("75", "25")
    assert (first["times as fast"], second["times as fast"]) == ("3.00", "1.00")


def test_only_environments_made_to_their_end_are_used(tmp_path, monkeypatch):
    monkeypatch.setattr(environments, "ROOT", tmp_path)
    assert speed.pythons_of("ppo", []) == {"ours": Path(sys.executable)}
    (tmp_path / ".venv-trl-ppo").mkdir()
    assert "trl" not in speed.pythons_of("ppo", [])
    (tmp_path / ".venv-trl-ppo" / ".installed").write_text("1.12.0")
    assert speed.pythons_of("ppo", [])["trl"] == tmp_path / ".venv-trl-ppo" / "bin" / "python"
    assert "trl" not in speed.pythons_of("grpo", [])
    assert list(speed.pythons_of("generate", [])) == ["ours", "transformers"]
    assert list(speed.pythons_of("ppo", ["trl"])) == ["trl"]
    assert list(speed.pythons_of("ppo", [], ["mkl"])) == ["ours_mkl", "trl"]
    assert list(speed.pythons_of("ppo", ["ours"], ["onednn", "mkl"])) == ["ours", "ours_mkl"]


def test_this_library_takes_a_turn_for_each_number_of_blocks_that_train():
    case = Case("ppo", "small", "full", "", 1, 1)
    pythons = {"ours": Path("a"), "ours_mkl": Path("a"), "trl": Path("b")}
    entrants = speed.entrants_of(case, pythons, [-1, 2])
    assert [(e.system, e.case.num_layers_unfrozen) for e in entrants] == [
        ("ours", -1),
        ("ours", 2),
        ("ours_mkl", -1),
        ("ours_mkl", 2),
        ("trl", -1),
    ]
    assert all(entrant.python == pythons[entrant.system] for entrant in entrants)
    assert speed.parsed(["ppo", "--unfrozen", "-1", "2"]).name == "ppo-small-full-all-top2"
    assert speed.parsed(["ppo", "--unfrozen", "2"]).name == "ppo-small-full-top2"
    assert speed.parsed(["ppo"]).name == "ppo-small-full"


@pytest.mark.parametrize("arguments", [["sft", "--unfrozen", "2"], ["ppo", "--iterations", "5", "--attempts", "4"]])
def test_what_cannot_be_measured_is_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        speed.parsed(arguments)
    assert arguments[1] in capsys.readouterr().err.splitlines()[-1]  # above it all options are listed


def test_without_onednn_the_same_work_is_done_by_mkl(monkeypatch):
    case = Case("sft", "small", "full", "", torch.get_num_threads(), 1)
    before = torch.backends.mkldnn.enabled
    x, weight = torch.rand(1024, 128), torch.rand(128, 128)
    try:
        with torch.random.fork_rng():
            assert run_of("ours", case) is run_of("ours_mkl", case)
        assert not suits(x, weight)
    finally:
        torch.backends.mkldnn.enabled = before
    assert suits(x, weight)


def test_packed_examples_fill_the_room_that_rows_would_have(tmp_path, monkeypatch):
    monkeypatch.setattr(ours, "quiet", lambda: None)  # it would silence Lightning's loggers for the other tests as well
    monkeypatch.setitem(sizes.SIZES, "tiny", sizes.Size(16, 2, 2, 64))
    save(tmp_path, SIZES["tiny"], "full")
    replies = io.StringIO()
    case = Case("sft_packed", "tiny", "full", str(tmp_path), torch.get_num_threads(), 2)
    with pytest.raises(SystemExit):
        ours.offline(case, Gate(io.StringIO("stop\n"), replies))
    tokens = [sum(row) for row in json.loads(replies.getvalue())["rows"]]
    assert 16 * 192 - 160 < sum(tokens) <= 16 * 192  # an example has at most 64 + 96
    assert len(tokens) > 16


@pytest.mark.slow
def test_two_systems_take_turns_on_the_same_prompts(tmp_path):
    save(tmp_path, SIZES["small"], "full")
    case = Case("generate", "small", "full", str(tmp_path), 1, iterations=3)
    python = Path(sys.executable)
    results = measure(
        [Entrant(system, python, case) for system in ("ours", "transformers")], 1, 1, float("inf"), tmp_path
    )
    assert [result.system for result in results] == ["ours", "transformers"]
    ours, transformers = (result.iterations[0]["rows"] for result in results)
    assert ours == transformers
    assert {response for _, response in ours} == {64}
    assert all(0.1 < result.peak < 4 for result in results)


@pytest.mark.slow
def test_a_system_that_fails_says_why(tmp_path):
    case = Case("generate", "small", "full", str(tmp_path / "nothing"), 1, iterations=3)
    with pytest.raises(RuntimeError, match="`transformers` stopped"):
        measure([Entrant("transformers", Path(sys.executable), case)], 1, 1, float("inf"), tmp_path)
