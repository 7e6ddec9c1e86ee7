"""Two processes under plain DDP and under FSDP2, beside one process on the whole batch."""

from itertools import chain, zip_longest

import numpy as np
import pytest
import torch

from lightning_rlhf.models.reference import fingerprint
from tests.distributed import cases
from tests.distributed.cases import OF_TWO, ONLY, PROMPTS, SAME, early_letters
from tests.distributed.spawn import spawned

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(660),  # the first test of a strategy waits for all of its cases
    pytest.mark.filterwarnings("ignore:The tokenizer has 8 tokens and the model 7 rows"),
]


@pytest.fixture(scope="module", params=["ddp", "rlhf_fsdp2"])
def strategy(request):
    """What spreads a module over the processes."""
    return request.param


@pytest.fixture(scope="module")
def two(strategy, tmp_path_factory):
    """What every case came to, on each of two processes."""
    names = SAME + OF_TWO + ONLY.get(strategy, [])
    return spawned("tests.distributed.cases", names, strategy, tmp_path_factory.mktemp(strategy))


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The same on a process alone, for what can be done there."""
    return {name: getattr(cases, name)("auto", tmp_path_factory.mktemp(name)) for name in SAME}


GROUP = {
    "grpo": 3,
    "grpo_t5_hydra": 3,
    "grpo_hydra": 4,
    "grpo_silent": 2,
}  # rows that are dealt together; one by default


def dealt(parts, group=1):
    """Rows of two processes in the order in which they were dealt."""
    parts = [[rows[i : i + group] for i in range(0, len(rows), group)] for rows in parts]
    return [row for rows in chain(*zip_longest(*parts, fillvalue=[])) for row in rows]


def both(two, name):
    results = two[name]
    for result in results:
        assert not isinstance(result, str), result  # what it failed with
    return results


@pytest.mark.invariant(28, 37)
@pytest.mark.parametrize(
    "name", [name for name in SAME if name not in ("sft", "sft_streamed", "reward_model", "process_reward")]
)
def test_two_processes_write_what_one_writes_and_every_row_keeps_its_score(one, two, name):
    first, second = (result["experiences"] for result in both(two, name))
    alone = one[name]["experiences"]
    assert len(alone) >= 2
    for ours, theirs, whole in zip(first, second, alone, strict=True):
        for field in ("prompts", "tokens", "responses"):
            assert dealt([ours[field], theirs[field]], GROUP.get(name, 1)) == whole[field]
        assert dealt([ours["scores"], theirs["scores"]], GROUP.get(name, 1)) == pytest.approx(whole["scores"], abs=1e-6)
        if name not in ("ppo_named", "ppo_reward_adapter"):  # which a classifier judges
            assert ours["scores"] == pytest.approx(early_letters(ours["prompts"], ours["responses"]), abs=1e-6)


@pytest.mark.invariant(30, 37)
@pytest.mark.parametrize("name", SAME)
def test_two_processes_come_to_the_gradients_and_weights_of_one(one, two, name):
    first, second = both(two, name)
    assert (first["world"], second["world"], one[name]["world"]) == ((0, 2), (1, 2), (0, 1))
    assert torch.equal(first["weights"], second["weights"])
    torch.testing.assert_close(first["weights"], one[name]["weights"], rtol=0, atol=1e-5)
    assert first["norms"] == second["norms"] == pytest.approx(one[name]["norms"], rel=1e-4)
    assert len(first["norms"]) >= 4
    assert min(first["norms"]) > 1e-3


@pytest.mark.invariant(40)
@pytest.mark.parametrize("name", SAME)
def test_two_processes_log_what_one_logs(one, two, name):
    first, second = both(two, name)
    assert first["metrics"] == second["metrics"]
    for ours, whole in zip(first["metrics"], one[name]["metrics"], strict=True):
        assert ours.keys() == whole.keys()
        for metric, value in ours.items():
            assert value == pytest.approx(whole[metric], rel=1e-4, abs=2e-5), metric


@pytest.mark.invariant(18, 37)
def test_an_export_of_two_processes_scores_as_that_of_one(one, two):
    alone = one["reward_model"]
    assert any(name.startswith("val/preference/accuracy/book") for name in alone["metrics"][-1])
    for result in both(two, "reward_model"):
        assert result["exported"] == pytest.approx(alone["exported"], abs=1e-4)
        assert result["scores"] == pytest.approx(alone["scores"], abs=1e-5)


@pytest.mark.invariant(19, 28)
def test_processes_score_the_steps_of_their_own_rows_with_one_model(two):
    results = both(two, "process_reward")
    for result in results:
        assert result["judged"] == pytest.approx(result["expected"], abs=1e-5)
        assert min(map(abs, result["judged"])) > 0.0
    assert results[0]["judged"] != results[1]["judged"]


@pytest.mark.invariant(24)
@pytest.mark.parametrize("name", ["ppo", "ppo_hydra", "uneven_rows"])
def test_advantages_are_whitened_over_the_tokens_of_both(one, two, name):
    first, second = both(two, name)
    for ours, theirs, whole in zip(first["experiences"], second["experiences"], one[name]["experiences"], strict=True):
        rows = dealt([ours["advantages"], theirs["advantages"]])
        for row, expected in zip(rows, whole["advantages"], strict=True):
            assert row == pytest.approx(expected, abs=1e-4)
        values = np.concatenate(rows)
        assert (values.mean(), values.std()) == pytest.approx((0.0, 1.0), abs=1e-5)
    assert abs(np.concatenate(first["experiences"][0]["advantages"]).mean()) > 1e-2  # on one of them alone


@pytest.mark.invariant(25, 30)
def test_processes_leave_out_unlike_numbers_of_rows_without_a_signal(two):
    """Of which the weights above know nothing."""
    numbers = [
        [sum(not any(row) for row in experience["advantages"]) for experience in result["experiences"]]
        for result in both(two, "grpo_silent")
    ]
    assert all(map(sum, numbers))
    assert numbers[0] != numbers[1]


@pytest.mark.invariant(27)
def test_running_moments_are_those_of_the_whole_stream(two):
    first, second = both(two, "ppo")
    stream = np.array([score for run in (first, second) for e in run["experiences"] for score in e["scores"]])
    assert len(stream) == 24
    for result in (first, second):
        count, total, squares = result["moments"]
        assert (count, total, squares) == pytest.approx((24, stream.sum(), (stream**2).sum()), rel=1e-6)


@pytest.mark.invariant(38)
def test_a_process_that_has_done_writing_waits_for_none_and_hangs_none(two):
    first, second = both(two, "unlike_lengths")
    for ours, theirs in zip(first["experiences"], second["experiences"], strict=True):
        assert [len(tokens) for tokens in ours["tokens"]] == [6] * 3
        assert [len(tokens) for tokens in theirs["tokens"]] == [1] * 3


def test_where_rows_do_not_come_out_even_some_are_read_twice(two):
    first, second = both(two, "filled_up")
    assert [e["prompts"] for e in first["experiences"]] == [[PROMPTS[0], PROMPTS[2]], [PROMPTS[4]]]
    assert [e["prompts"] for e in second["experiences"]] == [[PROMPTS[1], PROMPTS[3]], [PROMPTS[0]]]


def test_a_plain_loader_is_dealt_to_the_processes(two):
    first, second = both(two, "plain_loader")
    read = [e["prompts"] for result in (first, second) for e in result["experiences"]]
    assert [len(prompts) for prompts in read] == [4, 4]
    assert sorted(chain(*read)) == sorted(PROMPTS)
    assert torch.equal(first["weights"], second["weights"])


@pytest.mark.parametrize("strategy", ["ddp"], indirect=True)
def test_gradients_are_added_up_on_each_process_and_exchanged_once(two):
    first, second = both(two, "added_up")
    assert len(first) == len(second) == 2
    assert first[0] != pytest.approx(second[0], rel=1e-3)
    assert first[1] == second[1]


@pytest.mark.invariant(30, 37)
@pytest.mark.parametrize("strategy", ["ddp"], indirect=True)
def test_what_rounding_alone_sets_apart_is_the_same_in_double_precision(two, tmp_path):
    alone = cases.in_double_precision("auto", tmp_path)
    for result in both(two, "in_double_precision"):
        assert result["norms"] == pytest.approx(alone["norms"], rel=1e-10)
        torch.testing.assert_close(result["weights"], alone["weights"], rtol=0, atol=1e-11)


@pytest.mark.invariant(36)
@pytest.mark.parametrize(
    "name", ["resumed", "resumed_whole", "resumed_grpo", "resumed_lora", "resumed_critic", "resumed_t5"]
)
def test_a_resumed_run_equals_an_uninterrupted_one(two, name):
    for result in both(two, name):
        whole, rest = result["whole"], result["rest"]
        assert len(rest["experiences"]) == 1
        assert rest["experiences"] == whole["experiences"][3:]
        assert rest["metrics"] == whole["metrics"][3:]
        assert rest["moments"] == whole["moments"]
        assert torch.equal(rest["weights"], whole["weights"])


@pytest.mark.invariant(36)
def test_where_one_process_is_told_to_end_both_do_and_save(two):
    for result in both(two, "told_to_end"):
        whole, rest = result["whole"], result["rest"]
        assert result["said"] == "SIGTERMException"
        assert len(rest["experiences"]) == 2
        assert rest["experiences"] == whole["experiences"][2:]
        assert torch.equal(rest["weights"], whole["weights"])


@pytest.mark.invariant(39)
@pytest.mark.parametrize(
    ("kind", "complaint"),
    [
        ("too_few", "ValueError: `reward` 'judge' returned 3 scores for 4 responses"),
        ("not_a_number", "ValueError: `reward` 'judge' gave nan for response 1 ("),
        ("raises", "RuntimeError: `reward` 'judge' raised KeyError: 'answer' (on 4 responses, the first of which is"),
    ],
)
def test_a_reward_that_fails_on_one_process_stops_both_and_the_last_checkpoint_is_whole(two, kind, complaint):
    first, second = both(two, f"failing_{kind}")
    assert second["said"].startswith(complaint)
    assert first["said"].startswith(f"RuntimeError: `reward` 'judge' failed on rank 1: {complaint}")
    if kind == "not_a_number":
        assert repr(second["second"]) in first["said"]
    for result in (first, second):
        assert result["left"] == ["kept.ckpt"]
        assert result["done"] == 3


@pytest.mark.invariant(38)
@pytest.mark.parametrize("strategy", ["rlhf_fsdp2"], indirect=True)
def test_a_sharded_policy_is_gathered_once_for_all_that_it_writes(two):
    for gathers in both(two, "gathered"):
        assert gathers == [4, 4, 4]  # three blocks and the rest, for one token, three or six


@pytest.mark.invariant(18)
@pytest.mark.parametrize("strategy", ["rlhf_fsdp2"], indirect=True)
@pytest.mark.parametrize("name", ["exported", "exported_lora", "exported_t5"])
def test_a_sharded_policy_is_exported_whole(two, name):
    for difference in both(two, name):
        assert difference <= (1e-5 if name == "exported_lora" else 0.0)


@pytest.mark.parametrize("strategy", ["rlhf_fsdp2"], indirect=True)
def test_weights_are_dealt_out_by_a_process_that_alone_held_them(two):
    first, second = two["spread"]
    assert first.keys() == second.keys()
    for name in first:
        assert first[name]["difference"] == second[name]["difference"] == 0.0, name
        assert first[name]["count"] == second[name]["count"] > 20
        embedding = cases.WORDS * 16 * 4  # bytes; no other weight is as large
        assert first[name]["largest"] >= embedding
        assert second[name]["largest"] == embedding / 2, name


@pytest.mark.invariant(37, 38)
@pytest.mark.parametrize("strategy", ["rlhf_fsdp2"], indirect=True)
def test_a_policy_that_stays_in_shards_writes_the_same_and_hangs_nobody(one, two):
    alone = one["unlike_lengths"]
    first, second = both(two, "in_step")
    for ours, theirs, whole in zip(first["experiences"], second["experiences"], alone["experiences"], strict=True):
        assert dealt([ours["tokens"], theirs["tokens"]]) == whole["tokens"]
    torch.testing.assert_close(first["weights"], alone["weights"], rtol=0, atol=1e-5)
    for result in (first, second):
        assert result["gathers"][1:] == [3 * 3, 6 * 3]  # three blocks, again for every token


@pytest.mark.invariant(36)
@pytest.mark.parametrize("strategy", ["rlhf_fsdp2"], indirect=True)
def test_shards_go_on_from_a_single_file(two):
    for result in both(two, "one_file"):
        assert result["is_file"]
        assert result["rest"]["experiences"] == result["whole"]["experiences"][3:]
        assert torch.equal(result["rest"]["weights"], result["whole"]["weights"])


def test_a_reward_that_fails_beside_a_reward_model_stops_both(two):
    first, second = two["failing_beside"]
    assert second.startswith("RuntimeError: `reward` 'judge' raised KeyError: 'answer'")
    assert "failed on rank 1: RuntimeError: `reward` 'judge' raised KeyError" in first


@pytest.mark.invariant(39)
def test_an_endpoint_that_fails_one_process_stops_both_and_names_the_sample(two):
    first, second = two["failing_endpoint"]
    complaint = "RuntimeError: `reward` 'judge' raised EndpointError: `url='http://127.0.0.1"
    assert second.startswith(f"2 {complaint}")
    assert "answered 400 Bad Request ('\"no\"') on responses 2 to 3, the first of them" in second
    assert first.startswith("2 RuntimeError: `reward` 'judge' failed on rank 1: ")
    assert "on responses 2 to 3, the first of them" in first


def test_a_tie_that_one_process_alone_sees_and_cannot_learn_from_stops_both(two):
    first, second = two["failing_ties"]
    complaint = "ValueError: `tie_threshold=0.0` says that no two responses tie, and 1 of this batch do"
    assert len(first) == len(second) == 2
    assert all(said.startswith(complaint) for said in second)
    assert all(said.startswith(f"RuntimeError: the loss failed on rank 1: {complaint}") for said in first)


@pytest.mark.invariant(37, 40)
def test_two_processes_measure_and_answer_every_row_once(two, tmp_path):
    alone = cases.evaluated("auto", tmp_path)
    first, second = both(two, "evaluated")
    for part in ("before", "texts", "after", "losses"):
        assert first[part] == second[part]
        expected = {name: value for name, value in alone[part].items() if name != "val/rows"}
        assert {name: first[part][name] for name in expected} == pytest.approx(expected, abs=2e-5), part
    assert abs(alone["after"]["val/reward/mean"] - alone["before"]["val/reward/mean"]) > 0.1  # after it learnt
    assert first["before"]["val/rows"] == pytest.approx((4 * 4 + 3 * 3) / 7, abs=1e-6)
    assert (first["measured"], second["measured"]) == (4 * 4, 4 * 3)  # the sanity check before training is one of four
    assert (first["predicted"], second["predicted"]) == ([0, 2, 4, 6], [1, 3, 5])
    assert first["written"] == alone["written"]
    assert alone["written"].count("\n") == 7


@pytest.mark.invariant(6, 28)
@pytest.mark.parametrize("is_told_to_stay_whole", [False, True])
def test_processes_score_their_own_rows_with_one_reward_model(two, strategy, is_told_to_stay_whole):
    name = "judged_whole" if is_told_to_stay_whole else "judged"
    first, second = both(two, name)
    expected = cases.classifier()  # made here as on the first process
    assert first["judge"] == second["judge"] == fingerprint(expected)
    is_sharded = strategy == "rlhf_fsdp2" and name == "judged"
    assert first["here"] + second["here"] == sum(p.numel() for p in expected.parameters()) * (1 if is_sharded else 2)
    assert torch.equal(first["weights"], second["weights"])
    needed = [[count for count, _ in result["passes"]] for result in (first, second)]
    assert needed[0] != needed[1]
    for result, other in ((first, second), (second, first)):
        for (own, made), (their, _) in zip(result["passes"], other["passes"], strict=True):
            assert made == (max(own, their) if is_sharded else own)
        assert len(result["experiences"]) == 2
        for experience in result["experiences"]:
            assert len(experience["scores"]) == 4
            assert experience["scores"] == pytest.approx(experience["expected"], abs=2e-5)


@pytest.mark.parametrize("strategy", ["ddp"], indirect=True)
def test_an_8_bit_optimizer_does_the_same_on_both_processes(two, tmp_path):
    first, second = both(two, "eight_bit")
    alone = cases.eight_bit("auto", tmp_path)
    assert torch.equal(first["weights"], second["weights"])
    # Adam makes whole steps of what is rounding noise, where a gradient is 0.
    assert float((first["weights"] - alone["weights"]).abs().median()) < 1e-5
    assert first["norms"] == pytest.approx(alone["norms"], rel=1e-2)


@pytest.mark.parametrize("strategy", ["rlhf_fsdp2"], indirect=True)
def test_an_8_bit_optimizer_of_shards_is_refused(two):
    complaint = "ValueError: `optimizer=AdamW8bit` of bitsandbytes cannot update sharded weights: use `torch.optim.Ada"
    for said in two["eight_bit_refused"]:
        assert said.startswith(complaint)
