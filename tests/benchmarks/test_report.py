"""Pages show what was measured, and nothing else of them changes."""

import importlib
import json
import re
from pathlib import Path

import pytest

from benchmarks import report, speed
from benchmarks.alternation import Result
from benchmarks.machine import MatrixRate


@pytest.fixture
def outputs(tmp_path):
    (tmp_path / "speed").mkdir()
    (tmp_path / "unfrozen" / "figures").mkdir(parents=True)
    (tmp_path / "speed" / "ppo.md").write_text("| new |\n")
    (tmp_path / "unfrozen" / "ppo.md").write_text("| n |\n\n![a curve](figures/curve.png)\n")
    (tmp_path / "unfrozen" / "figures" / "curve.png").write_bytes(b"PNG")
    return tmp_path


def region(name, text=""):
    return f"<!-- begin: {name} -->\n{text}<!-- end: {name} -->\n"


def test_a_region_gets_what_was_measured_as_often_as_it_is_asked_and_the_rest_stays(outputs):
    page = outputs / "page.md"
    page.write_text("# A\n" + region("speed/ppo", "| old |\n") + "B\n" + region("speed/none", "not yet\n") + "C\n")
    for _ in range(2):
        assert report.filled(page, outputs) == ["speed/none"]
        expected = "# A\n" + region("speed/ppo", "\n| new |\n\n") + "B\n" + region("speed/none", "not yet\n") + "C\n"
        assert page.read_text() == expected


def test_figures_come_along(outputs):
    page = outputs / "docs" / "page.md"
    page.parent.mkdir()
    page.write_text(region("unfrozen/ppo"))
    assert report.filled(page, outputs) == []
    assert (page.parent / "figures" / "curve.png").read_bytes() == b"PNG"


@pytest.mark.parametrize("text", ["<!-- begin: a -->\n", "<!-- end: a -->\n", region("a", "<!-- begin: b -->\n")])
def test_a_region_without_beginning_or_end_is_refused_and_nothing_written(text, outputs):
    page = outputs / "page.md"
    page.write_text(region("speed/ppo") + text)
    with pytest.raises(ValueError, match="by turns"):
        report.filled(page, outputs)
    assert page.read_text() == region("speed/ppo") + text


def measured(row, system, seconds, **more):
    return {
        "case": {
            "row": row,
            "size": more.pop("size", "base"),
            "lengths": more.pop("lengths", "full"),
            "num_layers_unfrozen": more.pop("top", -1),
        },
        "system": system,
        "seconds": {"median": seconds},
        "share_of_matrix_rate": {"whole": 0.5 if system == "ours" else 0.25},
        "peak_gib": seconds / 10,
        "disturbed": 0,
        "times_as_fast": 60.0 / seconds,
        "tokens_per_second": 1000 / seconds,
        **more,
    }


def test_the_summary_has_a_line_for_every_row_that_had_a_peer(outputs):
    assert report.summary(outputs / "speed") is None
    first = {
        "command": "python first",
        "results": [
            measured("ppo", "ours", 20.0, top=2),
            measured("ppo", "trl", 60.0, top=2),
            measured("sft_packed", "ours", 10.0),
            measured("sft_packed", "trl", 40.0, disturbed=1),
        ],
    }
    (outputs / "speed" / "a.json").write_text(json.dumps(first))
    alone = {"command": "python alone", "results": [measured("grpo", "ours", 3.0)]}
    (outputs / "speed" / "b.json").write_text(json.dumps(alone))
    table = report.summary(outputs / "speed").splitlines()
    assert table[2:4] == [
        "| ppo, base, full, top 2 blocks | 20.0 | 60.0 | 3.0 | 50 %, trl 25 % | 2.0, trl 6.0 |",
        "| sft_packed, base, full, DISTURBED | 10.0 (100 tokens/s) | 40.0 (25 tokens/s) | 6.0 | 50 %, trl 25 % | "
        "1.0, trl 4.0 |",
    ]
    assert "python first" in table[-1]
    assert "alone" not in "".join(table)


@pytest.mark.parametrize("systems", [["ours", "ours_mkl"], ["ours_mkl", "trl"], ["trl"], ["ours", "ours_mkl", "trl"]])
def test_only_this_library_as_it_is_beside_its_peer_is_a_line_of_the_summary(systems, outputs):
    results = [measured("sft", system, 3.0) for system in systems]
    (outputs / "speed" / "a.json").write_text(json.dumps({"command": "python it", "results": results}))
    assert report.summary(outputs / "speed") is None


def test_the_summary_goes_by_size_then_from_full_to_ragged_responses_then_from_all_blocks_to_few(outputs):
    kinds = [
        {"size": "base", "lengths": "ragged"},
        {"size": "base", "lengths": "full", "top": 2},
        {"size": "base", "lengths": "full"},
        {"size": "small", "lengths": "ragged"},
    ]
    for name, kind in zip("abcd", kinds, strict=True):
        results = [measured("ppo", system, 3.0, **kind) for system in ("ours", "trl")]
        (outputs / "speed" / f"{name}.json").write_text(json.dumps({"command": f"python {name}", "results": results}))
    lines = report.summary(outputs / "speed").splitlines()
    assert [line.split(" | ")[0] for line in lines[2:6]] == [
        "| ppo, small, ragged",
        "| ppo, base, full",
        "| ppo, base, full, top 2 blocks",
        "| ppo, base, ragged",
    ]
    assert "`python d`, `python c`, `python b`, `python a`" in lines[-1]


def test_the_summary_reads_what_a_measurement_writes(outputs, monkeypatch, capsys):
    def measure(entrants, count, attempts, *_):
        assert (count, attempts) == (1, 3)
        assert {entrant.case.iterations for entrant in entrants} == {5}
        seconds = {("ours", -1): 4.5, ("ours", 2): 2.0, ("trl", -1): 9.0}
        made = {"others": 0.0, "rows": [[40, 24]], "peak": 1.5, "versions": {"torch": "2"}}
        return [
            Result(e.system, e.case, [{**made, "seconds": seconds[e.system, e.case.num_layers_unfrozen]}])
            for e in entrants
        ]

    monkeypatch.setattr(speed, "measure", measure)
    monkeypatch.setattr(speed, "matrix_rates", lambda threads: {"MKL": MatrixRate("MKL", 100.0, (1, 2, 3))})
    monkeypatch.setattr(speed, "pythons_of", lambda *_: {"ours": Path("python"), "trl": Path("python")})
    monkeypatch.setattr(speed.workload, "save", lambda *_: None)
    options = ["ppo", "--unfrozen", "-1", "2", "--iterations", "1", "--output", str(outputs / "speed")]
    speed.main(options)
    capsys.readouterr()
    whole, line, _, made = report.summary(outputs / "speed").splitlines()[2:]
    assert whole.startswith("| ppo, small, full | 4.5 | 9.0 | 2.0 | ")
    assert line.startswith("| ppo, small, full, top 2 blocks | 2.0 | 9.0 | 4.5 | ")
    assert line.endswith(" | 1.5, trl 1.5 |")
    assert f"`python -m benchmarks.speed {' '.join(options)}`" in made
    page = (outputs / "speed" / "ppo-small-full-all-top2.md").read_text()
    assert page.startswith("| row | system | seconds (min to max) |")
    assert "| ppo small full, top 2 | ours | 2.00 (2.00 to 2.00) |" in page


def test_the_project_s_pages_can_be_filled(tmp_path):
    for name in report.PAGES:
        copy = tmp_path / name
        copy.parent.mkdir(exist_ok=True)
        copy.write_text((report.ROOT / name).read_text())
        before = copy.read_text()
        report.filled(copy, tmp_path / "nothing")
        assert copy.read_text() == before


def test_every_table_of_the_page_is_made_by_a_command_that_it_names():
    page, makefile = ((report.ROOT / name).read_text() for name in ("docs/performance.md", "Makefile"))
    recipe = makefile.partition("bench-report: ")[2].partition("\n\n")[0]
    commands = re.findall(r"python -m benchmarks\.(\w+) (.+)", recipe)
    assert len(commands) == 12
    names = {report.SUMMARY}
    for program, args in commands:
        options = importlib.import_module(f"benchmarks.{program}").parsed(args.split())
        assert options.output == report.ROOT / "outputs" / program
        assert options.command == f"python -m benchmarks.{program} {args}"
        names.add(f"{program}/{options.name}")
    assert set(re.findall(r"<!-- begin: (\S+) -->", page)) == names
