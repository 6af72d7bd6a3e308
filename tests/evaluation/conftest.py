from pathlib import Path

import pytest

from .echo import EchoModel, make_workdir


@pytest.fixture
def workdir(tmp_path: Path) -> Path:
    return make_workdir(tmp_path)


@pytest.fixture
def echo(workdir, monkeypatch) -> EchoModel:
    """The model that every checkpoint opens as."""
    from dllm.evaluation import evaluate
    from dllm.models.tokenizers import load_tokenizer

    model = EchoModel(load_tokenizer(workdir / "runs/echo/model"))
    monkeypatch.setattr(evaluate, "open_diffusion", lambda *_: model)
    return model
