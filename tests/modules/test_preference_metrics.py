import math

import pytest
import torch
from torchmetrics.classification import MulticlassCalibrationError

from lightning_rlhf.modules.preference_metrics import CalibrationError, PreferenceAccuracy, PreferenceMetrics


def test_accuracy_counts_equal_scores_by_half():
    accuracy = PreferenceAccuracy()
    accuracy.update(torch.tensor([1.0, -2.0, 0.0]))
    accuracy.update(torch.tensor([0.5]))
    assert float(accuracy.compute()) == 2.5 / 4


def test_calibration_error_by_hand():
    # Confidence 0.75 in both of two, of which one is right; 0.9 in one that is.
    logits = torch.tensor([3.0, 1 / 3, 9.0]).log()
    error = CalibrationError()
    error.update(logits)
    assert float(error.compute()) == pytest.approx(2 / 3 * 0.25 + 1 / 3 * 0.1, rel=1e-6)


@pytest.mark.parametrize("num_bins", [15, 7])
def test_calibration_error_is_torchmetrics_own_however_it_is_split(num_bins):
    logits = 2.0 * torch.randn(4000, dtype=torch.float64) + 0.3
    chances = torch.stack([logits.sigmoid(), (-logits).sigmoid()], dim=1)
    theirs = MulticlassCalibrationError(num_classes=2, n_bins=num_bins, norm="l1")
    theirs.update(chances, torch.zeros(4000, dtype=torch.long))
    ours = CalibrationError(num_bins)
    for part in logits.split(999):
        ours.update(part)
    assert float(ours.compute()) == pytest.approx(float(theirs.compute()), abs=1e-6)


def test_equal_scores_are_as_sure_of_an_answer_as_they_are_right():
    error = CalibrationError()
    error.update(torch.zeros(3))
    assert float(error.compute()) == 0.0


def test_the_calibration_of_what_is_not_a_number_is_none():
    error = CalibrationError()
    error.update(torch.tensor([1.0, math.nan]))
    assert math.isnan(float(error.compute()))


def test_groups_are_measured_by_themselves():
    metrics = PreferenceMetrics(torch.device("cpu"))
    metrics.update(torch.tensor([1.0, -1.0, 1.0]), ["a", "b", 3])
    metrics.update(torch.tensor([1.0]), ["b"])
    found = metrics.compute()
    assert found["preference/accuracy"] == 0.75
    assert {name: found[f"preference/accuracy/{name}"] for name in "ab3"} == {"a": 1.0, "b": 0.5, "3": 1.0}


def test_of_nothing_there_is_nothing_to_say():
    assert PreferenceMetrics(torch.device("cpu")).compute() == {}
