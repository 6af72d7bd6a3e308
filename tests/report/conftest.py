import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from fake_workdir import build_all, plan_dict, write_workdir  # noqa: E402  (this folder is no package)

from dllm.report.plan import ReportPlan  # noqa: E402


@pytest.fixture
def plan() -> ReportPlan:
    return ReportPlan.model_validate(plan_dict())


@pytest.fixture
def workdir(tmp_path: Path) -> Path:
    """A fresh work directory, nothing built."""
    return write_workdir(tmp_path / "work")


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work directory with everything built; tests only read it."""
    folder = write_workdir(tmp_path_factory.mktemp("built"))
    build_all(folder, ReportPlan.model_validate(plan_dict()))
    return folder
