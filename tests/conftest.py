"""What every test starts from: no network, a fixed seed, and few threads (tests run in parallel)."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported; a forgotten download fails at once
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import random

import numpy as np
import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
