"""What runs on a GPU, and says so where there is none."""

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.path.is_relative_to(__file__.rpartition("/")[0]):
            item.add_marker(
                pytest.mark.skip(reason="needs a GPU: `python -m pytest tests/gpu` on a machine that has one")
            )
