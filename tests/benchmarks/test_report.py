"""Pages show what was measured, and nothing else of them changes."""

import importlib
import json
import re

import pytest

from benchmarks import report


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
        "case": {"row": row, "size": "base", "lengths": "full", "num_layers_unfrozen": more.pop("top", -1)},
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
    assert len(commands) == 9
    names = {report.SUMMARY}
    for program, args in commands:
        options = importlib.import_module(f"benchmarks.{program}").parsed(args.split())
        assert options.output == report.ROOT / "outputs" / program
        assert options.command == f"python -m benchmarks.{program} {args}"
        names.add(f"{program}/{options.name}")
    assert set(re.findall(r"<!-- begin: (\S+) -->", page)) == names
