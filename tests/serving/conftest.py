from pathlib import Path

import pytest
import torch

import dllm
from tests.serving.servers import running, served
from tests.toys import LEARNT, save_toy


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """A toy that knows the answers of `LEARNT`: to teach it takes two seconds. No test writes there."""
    torch.set_num_threads(1)
    return save_toy(tmp_path_factory.mktemp("taught") / "toy", teach=LEARNT, length=64)


@pytest.fixture(scope="session")
def taught(checkpoint):
    return dllm.load(checkpoint, device="cpu")


@pytest.fixture(scope="session")
def url(taught):
    """The address of a server of the toy."""
    with running([served(taught)]) as server:
        yield server.url
