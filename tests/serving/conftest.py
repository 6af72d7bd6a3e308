import pytest
import torch

import dllm
from tests.serving.servers import running, served
from tests.toys import LEARNT, save_toy


@pytest.fixture(scope="session")
def taught(tmp_path_factory):
    """A toy that knows the answers of `LEARNT`."""
    torch.set_num_threads(1)
    return dllm.load(save_toy(tmp_path_factory.mktemp("taught"), teach=LEARNT, length=64), device="cpu")


@pytest.fixture(scope="session")
def url(taught):
    """The address of a server of the toy."""
    with running([served(taught)]) as server:
        yield server.url
