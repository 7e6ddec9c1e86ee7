"""What takes the place of a head allocates what the head does."""

import pytest
import torch

from lightning_rlhf.functional import head
from lightning_rlhf.functional.head import head_logprobs
from lightning_rlhf.planning.live import Live
from lightning_rlhf.planning.paper import HeadOnPaper

TOKENS, VOCABULARY, WIDTH = 1000, 1000, 64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("learns", ["all", "states", "nothing"])
def test_a_head_on_paper_takes_what_the_head_takes(learns, dtype, monkeypatch):
    monkeypatch.setattr(head, "TILE", TOKENS * VOCABULARY // 2)  # two products
    monkeypatch.setattr(head, "READ_AT_ONCE", 100 * VOCABULARY)

    def peak(say):
        states = torch.zeros(TOKENS, WIDTH, dtype=dtype, requires_grad=learns != "nothing")
        weight = torch.zeros(VOCABULARY, WIDTH, dtype=dtype, requires_grad=learns == "all")
        with Live("all") as live:
            live.ignore([states, weight])
            loss = say(states, weight, live).sum()
            if learns != "nothing":
                loss.backward()
        return live.peak.total()

    def said(states, weight):
        return head_logprobs(states, weight, None, torch.zeros(TOKENS, dtype=torch.long))

    paper = peak(lambda states, weight, live: HeadOnPaper.apply(states, weight, None, live, False))
    assert paper == pytest.approx(
        peak(lambda states, weight, _: torch.stack(said(states, weight))), rel=0.05
    )  # a few numbers per token are not counted
