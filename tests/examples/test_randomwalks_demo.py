import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_rlhf.examples.randomwalks.__main__ import main


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_the_demo_leaves_a_table_a_curve_logs_and_a_policy(tmp_path, capsys):
    main(["--epochs", "1", "--iterations", "2", "--output", str(tmp_path)])
    printed = capsys.readouterr().out
    for row in ("floor", "before", "after", "ceiling"):
        assert row in printed
    assert "0.346" in printed
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert list((tmp_path / "logs").rglob("events.*"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "policy")
    tokens = model.generate(**tokenizer(["b"], return_tensors="pt"), max_new_tokens=3, do_sample=False)
    assert len(tokenizer.decode(tokens[0], skip_special_tokens=True)) >= 1
    assert model.config.attn_pdrop == 0.1  # as it was configured, although PPO trained without


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_the_demo_learns_by_another_algorithm(tmp_path, capsys):
    main(["--algorithm", "grpo", "--epochs", "1", "--iterations", "2", "--output", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "after: GRPO" in printed
    assert "after 140 episodes" in printed
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
