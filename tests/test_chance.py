"""Random numbers as functions of what they are for."""

from typing import get_args

import numpy as np
import pytest
import torch

from lightning_rlhf.chance import Stream, derived_seed, row_uniforms

STREAMS = get_args(Stream)


def test_numbers_are_uniform() -> None:
    numbers = row_uniforms(0, "rollout", (3,), range(500), 40)
    assert numbers.shape == (500, 40)
    assert numbers.dtype == torch.float32
    assert float(numbers.min()) >= 0.0
    assert float(numbers.max()) < 1.0
    counts = torch.histc(numbers, bins=20, min=0.0, max=1.0).double()
    assert float(((counts - 1000.0) ** 2 / 1000.0).sum()) < 43.8  # of 19 degrees of freedom, once in a thousand
    assert float(numbers.var()) == pytest.approx(1 / 12, rel=0.03)


def test_neither_rows_nor_columns_have_to_do_with_each_other() -> None:
    numbers = row_uniforms(0, "rollout", (0,), range(400), 400).double().numpy()
    for table in (numbers, numbers.T):
        off = np.corrcoef(table)[~np.eye(400, dtype=bool)]
        assert np.abs(off).max() < 0.3  # six standard deviations of 1 / sqrt(400)
        assert np.abs(off).mean() == pytest.approx(np.sqrt(2 / np.pi / 400), rel=0.05)


def test_a_row_has_its_numbers_whatever_rows_are_beside_it() -> None:
    together = row_uniforms(1, "rollout", (2,), range(10), 6)
    assert torch.equal(row_uniforms(1, "rollout", (2,), [7, 3], 6), together[[7, 3]])
    assert torch.equal(row_uniforms(1, "rollout", (2,), [4], 6), together[4:5])
    assert torch.equal(row_uniforms(1, "rollout", (2,), np.arange(10), 6), together)


def test_a_longer_row_begins_as_a_shorter_one() -> None:
    assert torch.equal(row_uniforms(1, "rollout", (2,), [5], 64)[:, :7], row_uniforms(1, "rollout", (2,), [5], 7))


@pytest.mark.parametrize("group_size", [1, 3])
def test_one_process_and_two_draw_the_same_numbers(group_size: int) -> None:
    """Prompt j of rank r is number j * world_size + r, and response g of its group that times group_size plus g."""
    prompts, world_size = 4, 2
    whole = row_uniforms(0, "rollout", (5,), range(prompts * world_size * group_size), 8)
    for rank in range(world_size):
        mine = [j * world_size + rank for j in range(prompts)]
        rows = [prompt * group_size + g for prompt in mine for g in range(group_size)]
        assert torch.equal(row_uniforms(0, "rollout", (5,), rows, 8), whole[rows])


def test_what_they_are_for_tells_numbers_apart() -> None:
    made = [
        row_uniforms(*key, [row], 4)
        for key in [
            *((0, stream, (1, 2)) for stream in STREAMS),
            *((seed, "rollout", (1, 2)) for seed in (1, 2, 12, 2**40)),
            *((0, "rollout", counters) for counters in [(), (1,), (2,), (12,), (2, 1), (1, 2, 0), (0, 1, 2)]),
        ]
        for row in (0, 1, 2**33)
    ]
    assert len({tuple(numbers[0].tolist()) for numbers in made}) == len(made)


def test_nothing_is_drawn_from_a_global_generator() -> None:
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    row_uniforms(0, "rollout", (0,), range(3), 3)
    derived_seed(0, "noise", 1)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()


def test_numbers_stay_the_same_from_one_version_to_the_next() -> None:
    """Written down once: another number here is another run for every seed."""
    assert row_uniforms(0, "rollout", (0,), [0, 1], 3).tolist() == [
        [0.3536544442176819, 0.30335479974746704, 0.7598057985305786],
        [0.20478790998458862, 0.3252282738685608, 0.15922629833221436],
    ]
    assert row_uniforms(7, "generate", (), [123456789], 2).tolist() == [[0.49458223581314087, 0.9501352310180664]]
    assert derived_seed(0, "build") == 2638283367072733456
    assert derived_seed(42, "noise", 3, 1, 0) == 3181684998450630670


def test_a_seed_is_a_function_of_everything_it_is_given() -> None:
    keys = [
        *((seed, stream, *counters) for seed in (0, 1) for stream in STREAMS for counters in [(), (0,), (1,), (0, 0)]),
        (0, "noise", 1, 2, 3),
        (0, "noise", 3, 2, 1),
        (0, "noise", 12, 3),
    ]
    seeds = [derived_seed(*key) for key in keys]
    assert len(set(seeds)) == len(seeds)
    assert seeds == [derived_seed(*key) for key in keys]


def test_seeds_use_all_bits_that_a_generator_takes() -> None:
    seeds = [derived_seed(0, "noise", i) for i in range(200)]
    assert all(isinstance(seed, int) and 0 <= seed < 2**63 for seed in seeds)
    assert max(seeds) > 2**62
    assert np.bitwise_or.reduce(seeds) == 2**63 - 1
    assert np.bitwise_and.reduce(seeds) == 0
    for seed in seeds[:3]:
        torch.Generator().manual_seed(seed)
