from pathlib import Path

import pytest
import torch

from tests.toys import LEARNT, save_toy


@pytest.fixture(scope="session")
def project(tmp_path_factory) -> Path:
    """A directory with one chat run, which knows the answers of `LEARNT`, below results/."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("project")
    save_toy(root / "results/laptop/runs/chat-toy/model", teach=LEARNT, response_end="block", length=64)
    return root


@pytest.fixture
def here(project, monkeypatch) -> Path:
    monkeypatch.chdir(project)
    return project
