"""The command line: quick help, one line per mistake, exit statuses that scripts can rely on."""

import resource
import subprocess
import sys
from types import SimpleNamespace

import pytest

from dllm.cli import main as command
from dllm.cli.main import VERBS, main
from dllm.cli.train import check_threads
from dllm.numbers import environment_number


def run_dllm(*words: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "dllm", *words], capture_output=True, text=True, **options)


@pytest.fixture
def verb(monkeypatch):
    """Make `dllm train` do what a test says."""

    def install(act):
        module = SimpleNamespace(HELP="do it", add_arguments=lambda parser: None, run=act)
        monkeypatch.setattr(command, "import_module", lambda name: module)

    return install


def test_help_is_quick():
    def seconds() -> float:
        begin = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
        run_dllm("--help", check=True)
        return sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]) - begin

    assert min(seconds() for _ in range(3)) < 0.3  # of a processor, about 0.05; with torch it is above 1


def test_help_lists_every_verb_with_its_line(capsys):
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(any(line.split()[:1] == [verb] for line in printed.splitlines()) for verb in VERBS)
    assert "examples:" in printed and max(map(len, printed.splitlines())) <= 100


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself_with_examples(verb, capsys):
    assert main([verb, "--help"]) == 0
    printed = capsys.readouterr().out
    assert (
        f"usage: dllm {verb}" in printed and "examples:" in printed and f"dllm {verb} " in printed.split("examples:")[1]
    )


def test_without_a_verb_the_help_is_shown_and_the_status_is_2(capsys):
    assert main([]) == 2
    assert "usage: dllm VERB" in capsys.readouterr().out


def test_the_version_is_the_packages(capsys):
    from importlib.metadata import version

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"dllm {version('dllm')}\n"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["trian"], "dllm: error: 'trian' is not a verb of dllm. Did you mean 'train'?"),
        (["frobnicate"], f"dllm: error: 'frobnicate' is not a verb of dllm. Known: {', '.join(VERBS)}."),
        (["--hepl"], "dllm: error: '--hepl' is not an option of dllm. Did you mean '--help'?"),
        (["train", "x", "--workdri", "y"], "dllm train: error: unknown argument --workdri y. Did you mean --workdir?"),
        (["train"], "dllm train: error: the following arguments are required: CONFIG; see dllm train --help"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_status_2(words, line, capsys):
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.err == line + "\n" and captured.out == ""


@pytest.mark.parametrize(
    ("fault", "line"),
    [
        (ValueError("name = 'x':\n  wrong"), "name = 'x': wrong"),
        (FileNotFoundError(2, "No such file or directory", "a.yaml"), "a.yaml: No such file or directory"),
        (PermissionError(13, "Permission denied", "a.yaml"), "a.yaml: Permission denied"),
        (
            ModuleNotFoundError("no", name="rich"),
            "the package 'rich' is not installed; install dllm with its dependencies",
        ),
    ],
)
def test_a_users_mistake_is_one_line_without_a_traceback(verb, fault, line, capsys, monkeypatch):
    def act(args):
        raise fault

    verb(act)
    assert main(["train"]) == 2
    assert capsys.readouterr().err == f"dllm train: error: {line}\n"
    monkeypatch.setenv("DLLM_DEBUG", "1")
    with pytest.raises(type(fault)):
        main(["train"])


WILD = {
    "binary": bytes(range(256)),
    "null": b"null",
    "number": b"5",
    "keys": b"? [1, 2]\n: 3\n1: 2\n",
    "tags": b"!!python/object/apply:os.system ['true']",
    "bomb": b"models: {x: [&a [x,x,x,x,x,x,x,x,x], "
    + b", ".join(b"&%c [%s]" % (n, b",".join([b"*%c" % (n - 1)] * 9)) for n in b"bcdefgh")
    + b"]}",
}


@pytest.mark.parametrize(
    "words",
    [
        "plan",
        "check --offline",
        "download",
        "prepare",
        "train",
        "evaluate",
        "report tables",
        "speed",
        "sample --config",
        "tune",
    ],
)
def test_a_wild_file_is_one_line_to_every_verb(words, tmp_path, capsys):
    for name, content in WILD.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "loop").symlink_to("loop")
    wild = [
        *(str(tmp_path / name) for name in (*WILD, "loop", "nobody")),
        str(tmp_path),
        "",
        "a\0b",
        "\udcff",
        "x" * 5000,
    ]
    for path in wild:
        assert main([*words.split(), path, *(["x.jsonl"] if words == "tune" else [])]) == 2, path[:99]
        printed = capsys.readouterr().err
        assert printed.startswith("dllm ") and printed.count("\n") == 1 and "validation error" not in printed, path[:99]


@pytest.mark.parametrize(
    ("stated", "kept"),
    [("4,2", "4"), (" 3 , 1", "3"), ("8", "8"), ("", None), ("auto", ""), ("0", ""), ("-1", ""), ("1e3", "")],
)
def test_the_first_number_of_omp_num_threads_is_kept_and_anything_else_is_one_line(stated, kept):
    environment = {"OMP_NUM_THREADS": stated}
    if kept == "":
        with pytest.raises(ValueError, match=f"OMP_NUM_THREADS = '{stated}'; set it to a number of threads"):
            check_threads(environment)
    else:
        check_threads(environment)
        assert environment.get("OMP_NUM_THREADS") == kept


def test_a_rank_that_is_no_number_is_one_line(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(ValueError, match="WORLD_SIZE = 'two' in the environment is not a number from 0 on"):
        environment_number("WORLD_SIZE", 1)


def test_a_bug_is_one_line_and_keeps_its_traceback_on_demand(verb, capsys, monkeypatch):
    verb(lambda args: 1 / 0)
    assert main(["train"]) == 70
    printed = capsys.readouterr().err
    assert printed.startswith("dllm train: error: this is a bug of dllm (ZeroDivisionError: division by zero at ")
    assert "DLLM_DEBUG=1 shows where" in printed and printed.count("\n") == 1
    monkeypatch.setenv("DLLM_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        main(["train"])


def test_too_little_memory_is_no_bug(verb, capsys):
    def act(args):
        raise MemoryError

    verb(act)
    assert main(["train"]) == 2
    assert "out of memory" in capsys.readouterr().err


def test_an_interrupt_is_status_130(verb, capsys):
    def act(args):
        raise KeyboardInterrupt

    verb(act)
    assert main(["train"]) == 130
    assert capsys.readouterr().err == "dllm train: interrupted\n"


def test_an_interrupt_while_packages_are_loaded_meets_no_code_of_theirs(tmp_path):
    """Some are C++ that calls Python, and abort where that raises an exception."""
    body = "import os, signal\ntry:\n    os.kill(os.getpid(), signal.SIGINT)\nexcept BaseException:\n    os.abort()\n"
    (tmp_path / "loaded.py").write_text(body)
    code = f"""if True:
        import sys; sys.argv = ["dllm", "train"]; sys.path.insert(0, {str(tmp_path)!r})
        from types import SimpleNamespace
        from dllm.cli import main as command
        verb = SimpleNamespace(HELP="do it", add_arguments=lambda parser: None, run=lambda args: __import__("loaded"))
        command.import_module = lambda name: verb
        raise SystemExit(command.main())
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "dllm train: interrupted\n")


def test_a_reader_that_goes_away_is_no_error():
    code = "from dllm.cli import main as m\nm.overview = lambda: 'x' * 10**6\nraise SystemExit(m.main(['--help']))"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.read(1)
    process.stdout.close()
    assert process.wait() == 141 and process.stderr.read() == b""
    process.stderr.close()


def test_the_module_runs_like_the_command():
    done = run_dllm("trian")
    assert (done.returncode, done.stderr) == (2, "dllm: error: 'trian' is not a verb of dllm. Did you mean 'train'?\n")


def test_a_closed_standard_output_is_no_bug(verb, monkeypatch):
    verb(lambda args: print("a line"))
    with monkeypatch.context() as patched:
        patched.setattr("sys.stdout", None)
        assert not main(["train"])
