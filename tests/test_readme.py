import re
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from tests.networks import network, tiny_gpt2

README = Path(__file__).parent.parent / "README.md"
EOS = "<|endoftext|>"


def byte_tokenizer():
    """A token per byte, and the one that ends a text; no PAD, like GPT-2's."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*alphabet, EOS])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, bos_token=EOS)


# Lightning's own advice for short runs with its own defaults.
@pytest.mark.filterwarnings("ignore:The number of training batches")
@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_the_code_of_the_readme_runs_as_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = network(tiny_gpt2(257, n_positions=128))
    model.save_pretrained("gpt2")  # a folder of that name stands for the model on the hub
    byte_tokenizer().save_pretrained("gpt2")
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) >= 4
    for number, block in enumerate(blocks):
        exec(compile(block, f"README.md, block {number}", "exec"), {"__name__": "__main__"})
    out = AutoModelForCausalLM.from_pretrained("out")
    assert (
        AutoTokenizer.from_pretrained("out").decode(AutoTokenizer.from_pretrained("out")("cat")["input_ids"]) == "cat"
    )
    difference = out.transformer.wte.weight - model.transformer.wte.weight
    assert 0 < difference.abs().max() < 0.1
    assert list(tmp_path.glob("lightning_logs/version_*/events.*"))


LIMITS = ["limit_train_batches=1", "limit_val_batches=1", "limit_predict_batches=1", "max_epochs=1", "accelerator=cpu"]
LIMITS += ["devices=1", "num_sanity_val_steps=0", "val_check_interval=1.0", "enable_progress_bar=false"]


@pytest.mark.filterwarnings("ignore:The number of training batches")
def test_the_commands_of_the_readme_run_one_after_the_other(tmp_path, monkeypatch):
    from lightning_rlhf.cli import main

    monkeypatch.chdir(tmp_path)
    section = README.read_text(encoding="utf-8").split("## From the command line")[1].split("\n## ")[0]
    commands = re.findall(r"^    lightning-rlhf (.+)$", section, flags=re.MULTILINE)
    assert len(commands) == 3
    for command in commands:
        main([*command.split(), *(f"--trainer.{limit}" for limit in LIMITS)])
    assert len((tmp_path / "outputs/randomwalks/ppo/responses.jsonl").read_text().splitlines()) == 20
