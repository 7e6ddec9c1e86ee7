"""The command line as a user meets it: YAML in a working folder of his own, and what goes wrong with it."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from lightning_rlhf import PPOModule
from lightning_rlhf.callbacks import ResponseWriter
from lightning_rlhf.cli import explained, found, main
from tests.networks import network, tiny_gpt2, word_tokenizer

REWARD = """
def score(prompts, responses):
    return [float(len(response.split())) for response in responses]

def polite(prompts, responses, tone=None):
    return [float("a" in response) for response in responses]

def steps(prompts, segments):
    return [[float(len(segment)) for segment in row] for row in segments]

def count(prompts, responses):
    return {"words": [len(response.split()) for response in responses]}
"""
RUN = {
    "trainer": {
        "max_epochs": 1,
        "accelerator": "cpu",
        "devices": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": {"class_path": "CSVLogger", "init_args": {"save_dir": "logs"}},
        "callbacks": [{"class_path": "RewardLogger"}],
    },
    "model": {
        "class_path": "PPOModule",
        "init_args": {
            "policy": {"model": "policy", "attn_implementation": "eager"},
            "reward": ["my_reward.score", ["my_reward.polite", 0.5]],
            "metric_fn": "my_reward.count",
            "sampling": {"max_new_tokens": 4},
            "evaluation_sampling": {"temperature": 0},
            "optimizer": {"class_path": "AdamW", "init_args": {"lr": 0.001}},
            "lr_scheduler": "linear",
            "minibatch_size": 3,
            "clip_range": 0.3,
        },
    },
    "data": {
        "class_path": "PromptDataModule",
        "init_args": {"prompts": ["a", "b c", "d"], "validation": ["e", "f"], "predict": "rows.jsonl", "batch_size": 3},
    },
}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A user's folder: a reward, a policy, rows, and a YAML."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "my_reward.py").write_text(REWARD)
    (folder / "run.yaml").write_text(yaml.safe_dump(RUN))
    rows = [{"prompt": "a b", "tone": 1}, {"prompt": "c", "tone": 2}, {"prompt": "d e f"}]
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    network(tiny_gpt2()).save_pretrained(folder / "policy")
    word_tokenizer().save_pretrained(folder / "policy")
    yield folder
    sys.modules.pop("my_reward", None)  # other tests count on its not being there


@pytest.fixture(autouse=True)
def _in_project(project, monkeypatch):
    monkeypatch.chdir(project)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])  # as a console script has it


@pytest.fixture(scope="module")
def trained(project):
    """The folder after a run from the YAML: its logs, a checkpoint and an export."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(project)
        patch.setattr(sys, "path", [path for path in sys.path if path])
        main(["fit", "--config", "run.yaml", "--model.gamma", "0.9", "--save_pretrained", "out/policy"])
    return project / "logs" / "lightning_logs" / "version_0"


def checkpoint(trained):
    (path,) = trained.rglob("*.ckpt")
    return str(path)


def built(capsys, *args):
    """The model's section that a command line comes to."""
    with pytest.raises(SystemExit) as end:
        main([*args, "--print_config"])
    assert end.value.code in (0, None)
    return yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]


def complaint(capsys, *args):
    with pytest.raises(SystemExit) as end:
        main(args)
    assert end.value.code == 2
    return capsys.readouterr().err


def without(changes):
    """The YAML, changed: `model.init_args.x` to a value, or a key to another key."""
    run = json.loads(json.dumps(RUN))
    for path, value in changes.items():
        *parents, last = path.split(".")
        section = run
        for parent in parents:
            section = section[int(parent)] if isinstance(section, list) else section.setdefault(parent, {})
        section[last] = value
    Path("changed.yaml").write_text(yaml.safe_dump(run))
    return ["fit", "--config", "changed.yaml"]


# --- runs -------------------------------------------------------------------------------------------------------------


def test_a_reward_beside_the_yaml_is_found_and_the_run_leaves_metrics_and_an_export(trained):
    with open(trained / "metrics.csv") as file:
        (row, *_) = csv.DictReader(file)
    assert {"reward/mean", "reward/score", "reward/polite", "val/reward/mean", "val/words"} <= set(row)
    exported = AutoModelForCausalLM.from_pretrained("out/policy")
    change = exported.transformer.wte.weight - network(tiny_gpt2()).transformer.wte.weight
    assert 0 < change.abs().max() < 0.1


def test_the_saved_configuration_says_everything_and_builds_the_same_again(trained, capsys):
    saved = yaml.safe_load((trained / "config.yaml").read_text())
    arguments = saved["model"]["init_args"]
    assert saved["seed_everything"] == 0
    assert (arguments["gamma"], arguments["clip_range"], arguments["num_epochs"]) == (0.9, 0.3, 4)
    assert arguments["reward"] == ["my_reward.score", ["my_reward.polite", 0.5]]
    assert (arguments["metric_fn"], arguments["lr_scheduler"]) == ("my_reward.count", "linear")
    assert built(capsys, "fit", "--config", str(trained / "config.yaml")) == arguments


def test_a_checkpoint_of_the_command_line_is_loaded_without_it(trained, monkeypatch):
    monkeypatch.syspath_prepend(str(Path.cwd()))
    module = PPOModule.load_from_checkpoint(checkpoint(trained))
    assert module.gamma == 0.9
    assert module.iteration == 1
    assert module.hparams["optimizer"]["init_args"]["lr"] == 0.001
    assert module.reward.weights == [1.0, 0.5]


def test_the_command_line_wins_over_the_checkpoint_and_the_checkpoint_over_defaults(trained, monkeypatch):
    modules = []
    monkeypatch.setattr("lightning_rlhf.cli.RLHFCLI._run_subcommand", lambda cli, name: modules.append(cli.model))
    run = ["fit", "--config", "run.yaml", "--ckpt_path", checkpoint(trained)]
    main([*run, "--model.init_args.clip_range", "0.4"])
    main(run)
    assert [module.hparams["clip_range"] for module in modules] == [0.4, 0.3]
    assert [module.gamma for module in modules] == [0.9, 0.9]  # which only the first run's command line said
    assert modules[0].sampling.max_new_tokens == 4
    assert modules[0].sampling_changes == {"temperature": 0}
    assert modules[0].reward.weights == [1.0, 0.5]


@pytest.mark.filterwarnings("ignore:The dirpath has changed")  # of a checkpoint callback that this run has no use for
def test_validate_reports_and_predict_writes_a_row_for_each_prompt(trained, capsys):
    main(["validate", "--config", "run.yaml", "--ckpt_path", checkpoint(trained)])
    assert "val/reward/mean" in capsys.readouterr().out
    main(["predict", "--config", "run.yaml", "--ckpt_path", checkpoint(trained), "--responses", "out/r.jsonl"])
    rows = [json.loads(line) for line in Path("out/r.jsonl").read_text().splitlines()]
    assert [(row["prompt"], row["tone"]) for row in rows] == [("a b", 1), ("c", 2), ("d e f", None)]
    assert all(len(row["response"].split()) <= 4 for row in rows)
    assert list(rows[0]) == ["tone", "prompt", "response"]


def test_responses_come_in_the_order_of_the_data_whatever_process_wrote_them(tmp_path, monkeypatch):
    writer = ResponseWriter(tmp_path / "rows.jsonl")

    class OnRankZero:
        is_global_zero = True

    writer.on_predict_start(OnRankZero, None)
    writer.on_predict_batch_end(OnRankZero, None, [{"prompt": "a", "row": 0}, {"prompt": "c", "row": 2}], None, 0)
    other = [(0, 1, '{"prompt": "b"}')]
    monkeypatch.setattr("lightning_rlhf.callbacks.response_writer.gather_objects", lambda rows: [rows, other])
    writer.on_predict_end(OnRankZero, None)
    assert (tmp_path / "rows.jsonl").read_text() == '{"prompt": "a"}\n{"prompt": "b"}\n{"prompt": "c"}\n'
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


# --- what can be said -------------------------------------------------------------------------------------------------


def test_arguments_of_every_base_class_can_be_overridden(capsys):
    arguments = built(
        capsys, "fit", "--config", "run.yaml", "--model.minibatch_size", "7", "--model.missing_eos_penalty", "1.5",
        "--model.optimizer.init_args.lr", "0.5", "--model.disable_dropout", "false", "--model.policy.dtype", "bfloat16",
        "--model.lr_scheduler", "cosine", "--model.evaluation_sampling.top_k", "3", "--model.kl_coef", "0.25",
    )  # fmt: skip
    assert (arguments["minibatch_size"], arguments["missing_eos_penalty"], arguments["kl_coef"]) == (7, 1.5, 0.25)
    assert arguments["optimizer"]["class_path"] == "torch.optim.AdamW"
    assert arguments["optimizer"]["init_args"]["lr"] == 0.5
    assert arguments["policy"]["model"] == "policy"
    assert (arguments["policy"]["dtype"], arguments["policy"]["attn_implementation"]) == ("bfloat16", "eager")
    assert (arguments["disable_dropout"], arguments["lr_scheduler"]) == (False, "cosine")


def test_a_policy_may_be_a_config_by_its_class_and_a_tokenizer_what_a_function_makes(monkeypatch):
    modules = []
    monkeypatch.setattr("lightning_rlhf.cli.RLHFCLI._run_subcommand", lambda cli, name: modules.append(cli.model))
    config = {"class_path": "transformers.GPT2Config", "init_args": {"n_layer": 3, "n_embd": 16, "n_head": 2}}
    tokenizer = {"class_path": "lightning_rlhf.examples.randomwalks.parts.tokenizer"}
    main(without({"model.init_args.policy": config, "model.init_args.tokenizer": tokenizer}))
    assert modules[0].spec.model.n_layer == 3
    assert len(modules[0].tokenizer) == 23


def test_help_names_the_commands_and_what_a_module_takes(capsys):
    for args, texts in {
        ("--help",): ["fit", "validate", "test", "predict"],
        ("fit", "--model.help", "PPOModule"): ["--model.clip_range", "How far a ratio may move", "--model.num_epochs"],
    }.items():
        with pytest.raises(SystemExit):
            main(args)
        printed = capsys.readouterr().out
        assert [text for text in texts if text not in printed] == []


def test_an_example_is_found_where_it_is_installed_unless_the_folder_has_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "examples/randomwalks/ppo.yaml"
    args = found(["fit", "--config", name, f"--config={name}", "-c", "examples/none.yaml", name])
    assert Path(args[2]).is_file()
    assert args[3] == f"--config={args[2]}"
    assert args[4:] == ["-c", "examples/none.yaml", name]
    Path(name).parent.mkdir(parents=True)
    Path(name).touch()
    assert found(["-c", name]) == ["-c", name]


@pytest.mark.slow
def test_a_console_script_finds_the_working_folder(project):
    script = "import sys; sys.path.pop(0); from lightning_rlhf.cli import main; main()"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    args = [sys.executable, "-c", script, "fit", "--config", "run.yaml", "--print_config"]
    done = subprocess.run(args, cwd=project, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "my_reward.score" in done.stdout


# --- what users get wrong ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.init_args.cliprange": 0.3}, "`cliprange` is no argument of PPOModule: did you mean `clip_range`?"),
        ({"model.init_args.optimiser": "AdamW"}, "`optimiser` is no argument of PPOModule: did you mean `optimizer`?"),
        ({"trainer.max_epoch": 3}, "`trainer.max_epoch` is no key of a configuration: did you mean `trainer.max_ep"),
        ({"modle.class_path": "PPOModule"}, "`modle` is no key of a configuration: did you mean `model`?"),
        ({"data.init_args.promts": ["a"]}, "`promts` is no argument of PromptDataModule: did you mean `prompts`?"),
        (
            {"trainer.callbacks.0.init_args": {"every_n_iteration": 2}},
            "`every_n_iteration` is no argument of RewardLogger: did you mean `every_n_iterations`?",
        ),
        ({"trainer.callbacks.0.class_path": "RewardLoger"}, "`RewardLoger` is no class that is known: did you mean `R"),
        ({"model.class_path": "PPOModul"}, "`PPOModul` is no class that is known: did you mean `PPOModule`?"),
        ({"data.class_path": "Xyzzyx"}, "`Xyzzyx` is no class that is known: one of your own is named with "),
        (
            {"model.init_args.optimizer.init_args.lrr": 1},
            "`lrr` is no argument of AdamW: did you mean `lr`?",
        ),
        (
            {"model.init_args.sampling.max_new_token": 3},
            "`max_new_token` is no argument of Sampling: did you mean `max_new_tokens`?",
        ),
        ({"model.init_args.lr_scheduler": "liner"}, "`lr_scheduler=liner` does not fit. Expected one of ['constant', "),
        ({"model.init_args.minibatch_size": "x"}, "`minibatch_size=x` does not fit. Expected a <class 'int'>."),
        ({"model.init_args": {"policy": "policy"}}, "`reward` is missing: PPOModule cannot do without."),
        ({"model.init_args.gamma": 3}, "`gamma=3.0` must lie between 0 and 1."),
        ({"model.init_args.evaluation_sampling.top": 3}, "`evaluation_sampling` knows no ['top']: it takes ["),
        ({"model.init_args.reward": "my_reward.scor"}, "`reward='my_reward.scor'` must be a callable or the dotted n"),
        ({"model.init_args.metric_fn": "my_reward.non"}, "`metric_fn='my_reward.non'` must be a callable or the d"),
        ({"data.init_args.prompts": []}, "`prompts` is empty: give at least one row."),
        ({"data.init_args.prompts": "none.jsonl"}, "`prompts='none.jsonl'`: there is no such file (looked in "),
    ],
)  # fmt: skip
def test_one_line_says_what_is_wrong(capsys, changes, message):
    said = complaint(capsys, *without(changes)).splitlines()[-1]
    assert said.startswith(f"lightning-rlhf: error: {message}")


def test_a_misspelt_option_of_the_command_line(capsys):
    assert "`modle` is no key of a configuration: did you mean `model`?" in complaint(
        capsys, "fit", "--config", "run.yaml", "--modle.gamma", "1"
    )
    assert "`gama` is no argument of PPOModule: did you mean `gamma`?" in complaint(
        capsys, "fit", "--config", "run.yaml", "--model.init_args.gama", "1"
    )


def test_what_is_missing_to_predict():
    with pytest.raises(ValueError, match="`test` is not given to PromptDataModule, and `test` needs rows: pass `"):
        main(["test", "--config", "run.yaml"])


def test_a_checkpoint_of_another_module_says_so_itself(trained, monkeypatch, capsys):
    stored = torch.load(checkpoint(trained), weights_only=True)
    stored["hyper_parameters"]["of_another"] = 1
    torch.save(stored, "other.ckpt")
    modules = []
    monkeypatch.setattr("lightning_rlhf.cli.RLHFCLI._run_subcommand", lambda cli, name: modules.append(cli.model))
    main(["fit", "--config", "run.yaml", "--ckpt_path", "other.ckpt"])
    assert modules[0].gamma == 1.0


def test_reward_models_dense_rewards_and_optimizers_of_bitsandbytes_are_written_in_yaml(project, tmp_path):
    from tests.rewards.test_model import gpt2

    gpt2(3).save_pretrained(project / "judge")
    word_tokenizer().save_pretrained(project / "judge")
    judge = {"model": {"model": "judge", "dtype": "float64"}, "label": "good", "output": "probability"}
    dense = {"score": "my_reward.steps", "split": "lines"}
    regex = {"class_path": "lightning_rlhf.RegexMatch", "init_args": {"pattern": "a"}}
    panel = {"rewards": [regex, "my_reward.score"], "combine": "mean-std", "coef": 0.5, "name": "panel"}
    rewards = [
        [{"class_path": "lightning_rlhf.RewardModel", "init_args": judge}, 0.5],
        {"class_path": "lightning_rlhf.DenseReward", "init_args": dense},
        [{"class_path": "lightning_rlhf.RepetitionPenalty", "init_args": {"n": 2}}, 0.1],
        {"class_path": "lightning_rlhf.RewardEnsemble", "init_args": panel},
        "my_reward.score",
    ]
    eight_bit = {"class_path": "bitsandbytes.optim.AdamW8bit", "init_args": {"lr": 0.001}}
    changes = {
        "model.init_args.reward": rewards,
        "model.init_args.normalize_rewards": ["judge"],
        "model.init_args.optimizer": eight_bit,
        "model.init_args.learning_rates": {"value": 0.01},
        "data.init_args.prompts": ["a ", "b c ", "d "],
        "trainer.logger": {"class_path": "CSVLogger", "init_args": {"save_dir": str(tmp_path)}},
        "trainer.callbacks": [],
    }
    main(without(changes))
    (path,) = tmp_path.rglob("metrics.csv")
    rows = list(csv.DictReader(path.read_text().splitlines()))
    logged = next(row for row in rows if row["reward/judge"])
    assert 0.0 < float(logged["reward/judge"]) < 1.0
    assert float(logged["reward/steps"]) > 0.0
    assert -1.0 <= float(logged["reward/repetition_penalty"]) <= 0.0
    assert float(logged["reward/panel"]) <= (float(logged["reward/regex"]) + float(logged["reward/score"])) / 2
    assert float(logged["optim/lr/value"]) == pytest.approx(10 * float(logged["optim/lr/policy"]), rel=1e-6)
    (kept,) = tmp_path.rglob("*.ckpt")
    stored = torch.load(kept, weights_only=True)["hyper_parameters"]
    assert stored["reward"][0][0]["init_args"]["model"]["dtype"] == "float64"
    assert stored["reward"][1]["init_args"] == dense
    assert (stored["normalize_rewards"], stored["learning_rates"]) == (["judge"], {"value": 0.01})


def test_a_bare_name_that_several_classes_have_is_refused_with_all_of_them():
    said = "Multiple subclasses with name Mine. Give the full class path to avoid ambiguity: one.Mine, other.Mine."
    expected = "`Mine` is the name of several classes: write the one that is meant, of one.Mine, other.Mine."
    assert explained(f"Problem with it:\n  {said}\n", []) == expected
