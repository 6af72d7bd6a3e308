import sys
from pathlib import Path

import pytest
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parent))

from fake_workdir import brief_dict, build_all, plan_dict, write_workdir  # noqa: E402  (this folder is no package)

from dllm.report.plan import ReportPlan  # noqa: E402


@pytest.fixture
def plan() -> ReportPlan:
    return ReportPlan.model_validate(plan_dict())


@pytest.fixture
def brief() -> ReportPlan:
    """The plan without its many curves, for tests of what does not depend on them."""
    return ReportPlan.model_validate(brief_dict())


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
def unsaved(monkeypatch) -> set[str]:
    """Every figure is drawn, but saved only if a test adds its name to this set; a line or an older file stands for it.

    For tests of what stands around figures: to save them takes longer than all else of a report.
    """
    names: set[str] = set()
    real = Figure.savefig

    def save(figure: Figure, path: Path, **options) -> None:
        if path.stem in names:
            real(figure, path, **options)
        elif not path.exists():
            path.write_text("<svg/>\n", encoding="utf-8")

    monkeypatch.setattr(Figure, "savefig", save)
    return names
