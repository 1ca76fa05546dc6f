"""For all tests."""

import pytest
import torch


@pytest.fixture(autouse=True)
def seed():
    """The same values in every run, whichever tests ran before in the process."""
    torch.manual_seed(0)
