"""`lightning-rlhf plan`: from a YAML to a table and a verdict."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest
import yaml

from benchmarks import memory
from lightning_rlhf import PPOModule
from lightning_rlhf.cli import RLHFCLI, main
from lightning_rlhf.planning.command import Asked
from lightning_rlhf.planning.networks import Networks
from lightning_rlhf.planning.paper import ACTIVATIONS, CACHE, LOGITS
from lightning_rlhf.planning.placement import Placement
from lightning_rlhf.planning.plan import BACKWARD, GATHERED, GENERATE, OPTIMIZER, POLICY, STEP, Plan, standing
from lightning_rlhf.planning.report import advice, fits
from tests.networks import tiny_gpt2
from tests.training import module_of, sft

EXAMPLES = Path(__file__).parents[2] / "examples" / "plans"
SCORE = "lightning_rlhf.examples.randomwalks.parts.score"
RUN = {
    "trainer": {"accelerator": "gpu", "devices": 4, "strategy": "rlhf_fsdp2"},
    "model": {
        "class_path": "PPOModule",
        "init_args": {"policy": "policy", "reward": SCORE, "sampling": {"max_new_tokens": 8}, "minibatch_size": 4},
    },
    "data": {"class_path": "PromptDataModule", "init_args": {"prompts": "none.jsonl", "batch_size": 4}},
}


@pytest.fixture(autouse=True)
def _in_project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_gpt2().save_pretrained("policy")  # a config alone
    Path("run.yaml").write_text(yaml.safe_dump(RUN))


def printed(capsys, *more):
    main(["plan", "--config", "run.yaml", *more])
    return capsys.readouterr().out


def complaint(capsys, *more):
    with pytest.raises(SystemExit) as end:
        main(["plan", "--config", "run.yaml", *more])
    assert end.value.code == 2
    return capsys.readouterr().err


def numbers(line):
    return [float(number) for number in re.findall(r"\d+\.\d+", line)]


def test_a_run_is_planned_without_its_weights_its_data_or_its_devices(capsys):
    out = printed(capsys, "--memory", "80")
    assert "Fits: 0.0 of 80 GiB on each of 4 devices" in out
    assert "A backward pass: 4 of 4 rows, each of 56 + 8 tokens" in out  # a tiny model has 64 positions
    assert "A rollout: 4 responses to 4 prompts." in out
    assert "Reference: a full copy." in out


def test_the_verdict_depends_on_memory_and_the_parts_add_up(capsys, monkeypatch):
    wide = ["--model.policy", json.dumps({"class_path": "transformers.GPT2Config", "init_args": {"n_layer": 3}})]
    plan = RLHFCLI(["plan", "--config", "run.yaml", *wide, "--memory", "3", "--prompt_tokens", "100"]).plan
    out = capsys.readouterr().out
    monkeypatch.setattr(Plan, "of", lambda *args: plan)  # the same for any memory
    lines = [line for line in out.splitlines() if line.startswith("│")]
    *parts, together = [numbers(line) for line in lines]
    assert len(together) == 4
    reported = max(together)
    more, less = (printed(capsys, *wide, "--memory", str(reported + d)) for d in (0.01, -0.01))
    assert "Fits" in more
    assert "Does NOT fit" in less
    assert "What would help:" in less
    assert "What would help:" not in more
    rows = {line.split("│")[1].strip(): line.split("│")[2:-1] for line in lines}
    for phase in range(4):
        added = sum(float(cells[phase]) for name, cells in rows.items() if name != "together" and cells[phase].strip())
        assert added == pytest.approx(float(rows["together"][phase]), abs=0.005 * len(rows))


def test_what_fit_reads_plan_reads(capsys):
    one = ["--trainer.devices", "1", "--trainer.strategy", "auto"]
    out = printed(capsys, *one, "--model.minibatch_size", "2", "--model.micro_batch_size", "1")
    assert "on the device" in out
    assert "A backward pass: 1 of 2 rows" in out
    out = printed(capsys, "--devices", "2", "--data.batch_size", "6", "--model.responses_per_prompt", "2")
    assert "on each of 2 devices" in out
    assert "A rollout: 12 responses to 6 prompts" in out


def test_a_policy_left_in_shards_has_no_more_gathered_while_it_writes_than_while_it_learns():
    path = "lightning_rlhf.strategies.fsdp2.RLHFStrategy"
    strategy = json.dumps({"class_path": path, "init_args": {"hold_weights": False}})
    plan = RLHFCLI(["plan", "--config", "run.yaml", "--trainer.strategy", strategy]).plan
    assert plan.bytes["generate"]["gathered weights"] == plan.bytes["backward"]["gathered weights"] > 0


def test_an_offline_module_is_planned_too(capsys):
    run = {
        "trainer": {"devices": 1},
        "model": {"class_path": "SFTModule", "init_args": {"policy": {"model": "policy", "num_layers_unfrozen": 1}}},
        "data": {"class_path": "ConversationDataModule", "init_args": {"batch_tokens": 100}},
    }
    Path("run.yaml").write_text(yaml.safe_dump(run))
    out = printed(capsys, "--prompt_tokens", "10", "--response_tokens", "15")
    assert "A backward pass: 4 of 4 rows, each of 10 + 15 tokens" in out
    assert "generate" not in out


def test_an_optimizer_of_bitsandbytes_is_read_as_fit_reads_it(capsys):
    optimizer = json.dumps({"class_path": "bitsandbytes.optim.AdamW8bit", "init_args": {"lr": 0.001}})
    one = ["--trainer.devices", "1", "--trainer.strategy", "auto"]
    assert "Fits: 0.0 of 80 GiB on the device" in printed(capsys, *one, "--model.optimizer", optimizer)


def test_a_datamodule_of_one_s_own_says_how_large_its_batches_are(capsys):
    starts = ["--data", "lightning_rlhf.examples.randomwalks.parts.Starts", "--data.prompts", "7"]
    assert "A rollout: 7 responses to 7 prompts" in printed(capsys, *starts)


def test_what_is_wrong_names_file_and_field(capsys):
    assert "run.yaml: `trainer.precision='transformer-engine'`" in complaint(
        capsys, "--trainer.precision", "transformer-engine"
    )
    Path("empty").mkdir()
    assert "run.yaml: `policy='./empty'` has no config" in complaint(capsys, "--model.policy", "./empty")
    assert "`minibatch_sise` is no argument of PPOModule" in complaint(capsys, "--model.minibatch_sise", "3")
    run = {key: section for key, section in RUN.items() if key != "data"}
    Path("run.yaml").write_text(yaml.safe_dump(run))
    assert "`data` is missing: a run cannot do without" in complaint(capsys)


@pytest.mark.parametrize("name", ["devices", "memory", "prompt_tokens", "response_tokens"])
def test_nothing_is_planned_for_less_than_nothing(name):
    with pytest.raises(ValueError, match=f"`{name}=0` must be positive"):
        Asked(**{name: 0})


def told(placement, part, phase=STEP, module=None, **arguments):
    """Advice to a run in which one part takes nearly everything in one phase."""
    module = module or module_of(PPOModule, **arguments)
    return " ".join(advice(Plan({phase: Counter({part: 99, POLICY: 1})}, []), module, placement))


def test_advice_is_about_what_is_large_and_is_not_done_yet():
    one, sharded = Placement(8, "ddp"), Placement(8, "sharded")
    assert "rlhf_fsdp2" in told(one, OPTIMIZER)
    assert "rlhf_fsdp2" not in told(one, ACTIVATIONS)
    assert "rlhf_fsdp2" not in told(sharded, OPTIMIZER)
    assert "AdamW8bit" in told(one, OPTIMIZER)
    eight_bits = {"class_path": "bitsandbytes.optim.AdamW8bit", "init_args": {"lr": 1e-6}}
    assert "AdamW8bit" not in told(one, OPTIMIZER, optimizer=eight_bits)
    assert "`hold_weights: false` of `RLHFStrategy`" in told(sharded, GATHERED, GENERATE)
    assert "hold_weights" not in told(sharded, GATHERED, BACKWARD)
    assert "hold_weights" not in told(Placement(8, "sharded", holds_weights=False), GATHERED, GENERATE)
    rows = told(one, ACTIVATIONS, BACKWARD, sft(optimizer=None))
    assert "gradient_checkpointing" in rows
    assert "accumulate_grad_batches" in rows
    assert "A smaller `micro_batch_size`" in told(one, ACTIVATIONS, BACKWARD, micro_batch_size=32)
    assert "A smaller `micro_batch_tokens`" in told(one, LOGITS, BACKWARD, micro_batch_tokens=20000)
    assert "micro_batch" not in told(one, LOGITS, BACKWARD, micro_batch_size=1)
    assert "`sampling.max_new_tokens`" in told(one, CACHE, GENERATE)


# The numbers of parameters that are published.
@pytest.mark.parametrize(
    ("name", "parameters"),
    [pytest.param("llama-70b", 70_553_706_496, marks=pytest.mark.slow), ("gpt-neox-20b", 20_554_567_680)],
)
def test_what_models_that_fit_nowhere_here_hold_is_known(name, parameters, monkeypatch):
    def held(module, placement, sizes):
        return Plan({"step": standing(module, Networks.of(module, placement), placement)[0]}, [])

    monkeypatch.setattr(Plan, "of", held)
    plan = RLHFCLI(["plan", "--config", str(EXAMPLES / f"{name}.yaml"), "--devices", "8"]).plan
    assert plan.bytes["step"]["policy"] == pytest.approx(4 * parameters / 8, rel=1e-3)
    assert fits(plan, 80) == (name != "llama-70b")


@pytest.mark.slow
def test_one_of_them_is_planned_as_a_whole(capsys):
    plan = RLHFCLI(["plan", "--config", str(EXAMPLES / "gpt-neox-20b.yaml"), "--devices", "8", "--memory", "80"]).plan
    assert list(plan.bytes) == ["generate", "score", "backward", "step"]
    assert plan.peak == "generate"
    assert "Fits: 7" in capsys.readouterr().out


# --- beside what is measured ------------------------------------------------------------------------------------------


def test_the_benchmark_says_what_was_measured_beside_the_plan():
    line = memory.line_of("full", {"gib": 2.0, "trained": 124e6}, {"gib": 1.6, "trained": 124e6}, 1.5)
    assert dict(zip(memory.HEADINGS, line, strict=True)) == {
        "trained": "full",
        "weights that train": "124.0 M",
        "planned, GiB": "1.50",
        "measured, GiB": "2.00",
        "planned / measured": "0.75",
        "freed memory returned, GiB": "1.60",
        "planned / returned": "0.94",
    }
