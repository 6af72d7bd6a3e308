import pytest
import torch

import dllm
from tests.toys import LEARNT, save_toy


@pytest.fixture(scope="session")
def taught(tmp_path_factory):
    """A toy that knows the answers of `LEARNT`."""
    torch.set_num_threads(1)
    return dllm.load(save_toy(tmp_path_factory.mktemp("taught"), teach=LEARNT), device="cpu")
