"""What a command finds around it is one line where it cannot be used."""

import os
import re
import subprocess
import sys
from errno import ENOSPC, ENOTDIR
from pathlib import Path

import pytest

from dllm.cli.main import main
from dllm.data.hub import HubUnreachable, one_line_errors
from dllm.models.load import local_directory
from dllm.surroundings import NUMBERS, check_surroundings
from tests.workflow.conftest import BIN, ROOT, variables


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("stated", ["abc", "-1", "", "1.5", "1e3", "²", "9" * 40])
def test_a_variable_that_packages_read_as_a_number_is_one(name, stated):
    with pytest.raises(ValueError, match=f"{name} = '{stated}' in the environment is not a whole number of .*unset it"):
        check_surroundings({name: stated})
    check_surroundings({name: " 86400 "})
    check_surroundings({})


@pytest.fixture
def gone(tmp_path, monkeypatch):
    """The current directory, which has been removed."""
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    yield
    monkeypatch.undo()


@pytest.mark.parametrize("words", [["sample", "model", "Hello"], ["plan", "x"], ["train", "x"], ["lm-eval", "ls"]])
def test_a_removed_directory_is_one_line_to_every_verb(words, gone, capsys):
    assert main(words) == 2
    printed = capsys.readouterr().err
    assert "the current directory cannot be read" in printed and "`cd .`" in printed and printed.count("\n") == 1


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["sample", "--help"]])
def test_help_needs_nothing_around_it(words, gone, monkeypatch, capsys):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "abc")
    assert main(words) == 0 and capsys.readouterr().out


def test_the_command_the_launcher_and_the_workflow_name_a_date_that_is_none():
    environment = variables() | {"SOURCE_DATE_EPOCH": "yesterday"}
    launcher = [sys.executable, str(ROOT / "workflow/launch.py"), "--with", str(ROOT / "config/accelerate/cpu.yaml")]
    commands = {
        ("dllm", 2): [sys.executable, "-m", "dllm", "sample", "model", "Hello"],
        ("launch", 2): [*launcher, "--", "train", "x"],
        ("workflow", 1): [str(BIN / "snakemake"), "-n", "--quiet", "all"],
    }
    for (name, status), command in commands.items():
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        printed = done.stdout + done.stderr
        said = [line for line in printed.splitlines() if "SOURCE_DATE_EPOCH = 'yesterday'" in line]
        assert done.returncode == status and len(said) == 1 and "Traceback" not in printed, (name, printed)


@pytest.mark.skipif(sys.platform != "linux", reason="a directory in use cannot be removed everywhere")
def test_python_starts_in_a_removed_directory(tmp_path):
    """The installed command, not only its function."""
    place = tmp_path / "gone"
    place.mkdir()
    code = f"import os; os.rmdir({str(place)!r}); from dllm.cli.main import main; raise SystemExit(main(['plan', 'x']))"
    found = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=place, env=found, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("dllm plan: error: the current directory cannot be read")


def test_a_cache_of_the_hub_that_cannot_be_written_is_named_and_no_fault_of_the_network(tmp_path, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(tmp_path / "home/.cache/huggingface"))
    line = f"the cache of the hub, {tmp_path}/home/.cache/huggingface, cannot be used (Not a directory); set HF_HOME to"
    for place in ("home/.cache", "home/.cache/huggingface/token"):
        fault = NotADirectoryError(ENOTDIR, "Not a directory", str(tmp_path / place))

        def fail(*_, fault=fault, **__):
            raise fault

        with pytest.raises(ValueError, match="^a/b: " + re.escape(line)), one_line_errors("a/b", "b", "model"):
            fail()
        monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
        with pytest.raises(ValueError, match="^a/b: " + re.escape(line)):
            local_directory("a/b", None)
    full = OSError(ENOSPC, "No space left on device", str(tmp_path / "home/.cache/huggingface/x"))
    for other in (full, PermissionError(13, "Permission denied", str(tmp_path / "downloads/x"))):
        with pytest.raises(OSError, match=str(Path(other.filename).name)), one_line_errors("a/b", "b", "model"):
            raise other
    with pytest.raises(HubUnreachable, match="check the network"), one_line_errors("a/b", "b", "model"):
        raise ConnectionResetError("reset")
