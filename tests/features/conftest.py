"""Features of torch on the path of a plain CPU process."""

import pytest
import torch

pytest.register_assert_rewrite("feature_tests", "distributed_checks")
torch.set_num_threads(1)
