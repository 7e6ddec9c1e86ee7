"""Time is put down to the right operator and phase, and adds up to the whole."""

from types import SimpleNamespace

import pytest
import torch

from benchmarks import ours, profile, sizes, workload
from benchmarks.sizes import SIZES
from benchmarks.workload import Case


def event(name, parent=None):
    return SimpleNamespace(name=name, cpu_parent=parent)


def test_the_innermost_phase_counts():
    step = event("Optimizer.step#AdamW.step")
    closure = event("phase: forward", step)
    backward = event("phase: backward", closure)
    assert profile._phase_of(event("aten::mm", event("aten::matmul", backward))) == "backward"
    assert profile._phase_of(event("aten::addmm", closure)) == "forward"
    assert profile._phase_of(event("aten::_fused_adamw_", step)) == "step"
    assert profile._phase_of(event("aten::sum")) == "other"


def test_operators_are_ordered_and_what_is_outside_of_them_completes_the_whole():
    seconds = {"rare": {"forward": 0.5}, "mm": {"forward": 1.0, "backward": 3.0}, "add": {"backward": 1.0}}
    lines = profile.lines_of(profile.Profile(seconds, {"rare": 1, "mm": 5, "add": 7}, wall=8.0), top=2)
    assert lines == [
        ["operator", "calls", "forward", "backward", "seconds", "share"],
        ["mm", "5", "1.000", "3.000", "4.000", "50.0 %"],
        ["add", "7", "0.000", "1.000", "1.000", "12.5 %"],
        ["all others", "1", "0.500", "0.000", "0.500", "6.2 %"],
        ["all operators", "13", "1.500", "4.000", "5.500", "68.8 %"],
        ["outside of operators", "", "", "", "2.500", "31.2 %"],
    ]


@pytest.mark.slow
def test_every_matrix_product_of_an_iteration_lies_in_a_phase(tmp_path, monkeypatch):
    monkeypatch.setattr(ours, "quiet", lambda: None)  # it would silence Lightning's loggers for the other tests as well
    monkeypatch.setitem(sizes.SIZES, "tiny", sizes.Size(16, 2, 2, 64))
    workload.save(tmp_path, SIZES["tiny"], "ragged")
    for row, phases in {"ppo": {"generate", "score", "forward", "backward"}, "sft": {"forward", "backward"}}.items():
        found = profile.run(Case(row, "tiny", "ragged", str(tmp_path), torch.get_num_threads(), 3))
        assert {phase for phase, spent in found.seconds["aten::mm"].items() if spent > 0} == phases
        assert list(found.seconds["aten::_fused_adamw_"]) == ["step"]
        assert 0 < sum(found.phase(phase) for phase in profile.PHASES) <= found.wall
        assert len(found.rows) == workload.BATCH
