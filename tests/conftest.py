"""What every test starts from: no network, one thread, no seed left over.

Nothing of `lightning_rlhf` is imported here: pytest must have hooked the shape checks in first.
"""

import os

# Read at import by the libraries that heed them; processes that tests start inherit them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["JSONARGPARSE_DEPRECATION_WARNINGS"] = "off"  # Lightning's command line calls it in the old way

import random

import numpy as np
import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _same_start() -> None:
    """No test depends on which ran before it: `seed_everything` leaves its seed in the environment."""
    os.environ.pop("PL_GLOBAL_SEED", None)
    os.environ.pop("PL_SEED_WORKERS", None)
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def wide_folders(tmp_path_factory):
    """A model of each family that can be quantised, with its tokenizer, by name; no test writes to them."""
    from tests.networks import WIDE, network, with_soft_attention, word_tokenizer

    made = {}
    for name, config in WIDE.items():
        made[name] = tmp_path_factory.mktemp(name)
        # With more spread, some write EOS at once, and attend to nothing.
        model = with_soft_attention(network(config(), spread=1.0))
        model.save_pretrained(made[name])
        word_tokenizer().save_pretrained(made[name])
    return made
