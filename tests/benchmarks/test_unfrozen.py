"""What frozen blocks save is counted, and too much is told."""

from pathlib import Path

import pytest

from benchmarks import ours, sizes, unfrozen, workload
from benchmarks.alternation import Result
from benchmarks.sizes import Size
from benchmarks.unfrozen import Cost
from benchmarks.workload import Case

SIZE = Size(width=32, layers=3, heads=2, vocabulary=96)


@pytest.fixture
def case(tmp_path, monkeypatch):
    monkeypatch.setattr(ours, "quiet", lambda: None)  # it would silence Lightning's loggers for the other tests as well
    monkeypatch.setitem(sizes.SIZES, "tiny", SIZE)
    workload.save(tmp_path, SIZE, "full")
    return lambda top: Case("ppo", "tiny", "full", str(tmp_path), 1, 2, top)


@pytest.mark.slow
def test_updates_of_few_blocks_execute_what_head_and_blocks_need_and_a_trunk_run_anew_is_found(case, monkeypatch):
    counted = [Cost(top, *unfrozen.count(case(top)), []) for top in (1, 2, 3)]
    one, two, three = (cost.counted for cost in counted)
    assert three - two == pytest.approx(two - one, rel=1e-3)  # every block that trains costs the same
    assert all(cost.is_low(counted[-1]) for cost in counted)
    assert all(cost.counted >= 0.98 * cost.needed for cost in counted)

    made = ours.module_of

    def forgetful(case):
        module = made(case)
        module.trunk_gib = 0.0
        return module

    monkeypatch.setattr(ours, "module_of", forgetful)
    assert not Cost(1, *unfrozen.count(case(1)), []).is_low(counted[-1])


def test_a_fifth_more_than_head_and_blocks_is_allowed():
    whole = Cost(4, counted=200.0, needed=10.0, seconds=[8.0])
    assert Cost(1, counted=60.0, needed=2.5, seconds=[]).is_low(whole)  # 0.3 = 1.2 * 0.25
    assert not Cost(1, counted=60.1, needed=2.5, seconds=[]).is_low(whole)
    assert unfrozen.lines_of([Cost(1, 60.0, 2.5, [1.0, 3.0, 2.0]), whole]) == [
        ["1", "60.0", "0.300", "0.300", "2.00 (1.00 to 3.00)", "0.250", "30"],
        ["4", "200.0", "1.000", "1.200", "8.00 (8.00 to 8.00)", "1.000", "25"],
    ]


def test_updates_that_others_disturbed_are_timed_and_it_is_said(tmp_path, monkeypatch, capsys):
    def measured(entrants, count, attempts, *_):
        ((system, case),) = [(entrant.system, entrant.case) for entrant in entrants]
        assert (system, count, attempts, case.iterations) == ("ours", 2, 7, 9)
        top = case.num_layers_unfrozen
        updates = [{"seconds": 99.0, "optimise": float(top + i)} for i in range(2)]
        return [Result("ours", case, updates, disturbed=int(top == 4))]

    monkeypatch.setattr(unfrozen, "measure", measured)
    monkeypatch.setattr(unfrozen, "count", lambda case: (100.0, 100.0))
    monkeypatch.setattr(workload, "save", lambda *_: None)
    unfrozen.main(
        ["--tops", "2", "--iterations", "2", "--attempts", "7", "--lengths", "ragged", "--no-curve"]
        + ["--output", str(tmp_path)]
    )
    two, four = (tmp_path / "ppo-small-ragged.md").read_text().splitlines()[2:4]
    assert two.split(" | ")[4:] == ["2.50 (2.00 to 3.00)", "0.556", "40 |"]
    assert four.split(" | ")[4:] == ["4.50 (4.00 to 5.00), 1 DISTURBED", "1.000", "22 |"]
    capsys.readouterr()


def test_a_table_and_a_small_curve_are_written_and_waste_ends_in_an_error(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(unfrozen, "count", lambda case: ([0.0, 50.0, 40.0, 70.0, 100.0][case.num_layers_unfrozen],) * 2)
    monkeypatch.setattr(workload, "save", lambda *_: None)
    unfrozen.main(["--iterations", "0", "--output", str(tmp_path)])
    page = (tmp_path / "ppo-small-full.md").read_text()
    figure = tmp_path / "figures" / "unfrozen-ppo-small-full.png"
    assert f"({figure.relative_to(tmp_path)})" in page
    assert "`python -m benchmarks.unfrozen --iterations 0" in page
    assert 1000 < figure.stat().st_size < 60_000
    needed = {1: 30.0}  # where 50 are executed: 0.5 and at most 1.2 * 0.3
    executed = unfrozen.count
    monkeypatch.setattr(
        unfrozen, "count", lambda case: (executed(case)[0], needed.get(case.num_layers_unfrozen, executed(case)[0]))
    )
    with pytest.raises(SystemExit, match=r"\[1\]"):
        unfrozen.main(["--iterations", "0", "--no-curve", "--output", str(tmp_path)])
    capsys.readouterr()


def test_all_blocks_are_always_measured_and_more_than_there_are_is_refused(capsys):
    assert unfrozen.parsed(["--tops", "2", "1"]).tops == [1, 2, 4]
    assert unfrozen.parsed(["--size", "base"]).tops == list(range(1, 9))
    for wrong in ("0", "5"):
        with pytest.raises(SystemExit):
            unfrozen.parsed(["--tops", wrong])
        assert "--tops" in capsys.readouterr().err.splitlines()[-1]  # above it all options are listed
    assert Path(unfrozen.parsed([]).output).name == "unfrozen"
