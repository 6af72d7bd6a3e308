import shutil
import sys
from pathlib import Path

import pytest
from matplotlib.figure import Figure

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


@pytest.fixture
def unsaved(built: Path, monkeypatch) -> None:
    """Every figure is drawn, but a file of `built` stands for it, the one of its name if there is one.

    For tests of what stands around figures: to save them takes longer than all else of a report.
    """

    def save(figure: Figure, path: Path, **options) -> None:
        own = built / "figures" / path.name
        shutil.copy(own if own.exists() else own.with_stem("scores"), path)

    monkeypatch.setattr(Figure, "savefig", save)
