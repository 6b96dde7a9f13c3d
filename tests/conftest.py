"""One thread, one seed: every test gives the same numbers on every run."""

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
