"""A clone of a project with tracked results: what is planned, what is fetched, what is made again."""

import json
import os
import random
import re
import shutil
import subprocess

import pytest

from dllm.provenance import VOLATILE, directory_digest
from tests.cache.conftest import ROOT, WORK, Checkout
from workflow.cache import artifact_of

SNAKEMAKE = "snakemake -c2 --configfile config/paper.yaml"
CHAT = f"{WORK}/runs/chat-large/model"


def shell_block(page: str, first: str) -> str:
    """The command block of a page that begins with a line."""
    text = (ROOT / page).read_text(encoding="utf-8")
    (block,) = [block for block in re.findall(r"```bash\n(.*?)```", text, re.S) if block.startswith(first)]
    return block


def records(checkout: Checkout) -> dict:
    """Content of every record of a work directory."""
    found = [path for kind in ("data", "downloads", "runs") for path in (checkout.work / kind).glob("*.json")]
    return {str(path.relative_to(checkout.work)): json.loads(path.read_text()) for path in found}


def test_git_sees_records_pointers_and_small_results_only(published):
    seen = published.run("git ls-files results; git ls-files -o --exclude-standard").stdout.split()
    assert f"{WORK}/runs/chat-large.json" in seen and f"{CHAT}.dvc" in seen
    assert {path.removeprefix(f"{WORK}/").split("/")[0] for path in seen} == {
        ".snakemake", "benchmarks", "claims.json", "data", "downloads", "evals", "figures", "report", "runs", "tables",
    }  # fmt: skip
    assert not [path for path in seen if path.endswith((".safetensors", ".bin", ".npy", ".samples.jsonl", ".log"))]
    assert not [path for path in seen if ".snakemake/" in path and ".snakemake/metadata/" not in path]


def test_what_is_tracked_is_linked_and_not_copied(published):
    weights = published.path / CHAT / "model.safetensors"
    assert weights.stat().st_nlink == 2
    assert weights.stat().st_mode & 0o777 == 0o444


def test_a_fresh_clone_plans_nothing_whatever_the_times_of_its_files(clone):
    for path in clone.path.rglob("*"):
        if path.is_file() and ".git/" not in str(path):
            os.utime(path, times=(0, random.Random(str(path)).randrange(1_600_000_000, 1_700_000_000)))
    assert clone.planned() == []
    assert "Nothing to be done" in clone.run(SNAKEMAKE).stdout
    assert not (clone.path / CHAT).exists()
    assert clone.run("git status --short").stdout == ""
    (clone.path / "none.yaml").write_text("cache: none\n")
    assert "Nothing to be done" in clone.run(f"{SNAKEMAKE} none.yaml -n").stdout


def test_the_documented_clone_and_pull_bring_every_artifact_and_leave_nothing_to_do(published, storage, tmp_path):
    commands = shell_block("docs/reproduce.md", "git clone")
    commands = commands.replace("https://example.org/dllm.git", str(published.path))
    home = Checkout(tmp_path)
    done = home.run(commands, PYTHONPATH=str(tmp_path / "dllm"))
    assert "Nothing to be done" in done.stdout
    pulled = Checkout(tmp_path / "dllm")
    for record, content in records(pulled).items():
        found = directory_digest(pulled.work / record.removesuffix(".json"), (*VOLATILE, "model.dvc"))
        assert found["digest"] == content["digest"], record
    assert records(pulled) == records(published)


def test_one_checkpoint_and_one_evaluation_of_it(clone):
    before = (clone.work / "tables/metrics.json").read_bytes()
    done = clone.run(shell_block("docs/reproduce.md", "dvc pull results/paper/runs/chat-large/model.dvc"))
    assert re.findall(r"^Job \d+: (.*)\.$", done.stdout, re.M) == [
        "Evaluate chat-large on gsm8k",
        "Build the tables",
    ]
    assert (clone.work / "tables/metrics.json").read_bytes() == before
    assert "downloads/pocket-world: fetched from the remote" in done.stdout
    assert not [*clone.work.glob("data/*/")]


def test_one_changed_hyper_parameter_redoes_its_run_and_what_depends_on_it(clone):
    clone.set_run("chat-large", seed=43)
    assert clone.planned() == [
        ("evaluate", "chat-large/gsm8k"),
        ("evaluate", "chat-large/mmlu"),
        ("track", "evals/chat-large/gsm8k.samples.jsonl"),
        ("track", "evals/chat-large/mmlu.samples.jsonl"),
        ("track", "runs/chat-large/model"),
        ("train", "chat-large"),
    ]


def test_what_the_remote_has_lost_is_made_again_and_nothing_else(clone, storage, tmp_path):
    shutil.copytree(storage, tmp_path / "storage")
    clone.run(f"dvc remote modify --local storage url {tmp_path / 'storage'}")
    (lost,) = re.findall(r"md5: (\w+)", (clone.path / f"{CHAT}.dvc").read_text())
    held = tmp_path / "storage/files/md5" / lost[:2] / f"{lost[2:]}.dir"
    held.unlink()
    before = records(clone)
    (clone.work / "evals/chat-large/gsm8k.json").unlink()
    first = clone.run(SNAKEMAKE, check=False)
    assert first.returncode != 0
    (line,) = {line for line in first.stdout.splitlines() if line.startswith("error: ")}
    assert line.startswith("error: runs/chat-large/model: neither here nor in DVC's cache or remote")
    assert "snakemake (same options) -- runs/chat-large.json. Then start again." in line
    again = clone.run(
        shell_block("docs/reproduce.md", "snakemake -c1 --configfile config/paper.yaml -- runs/chat-large.json")
    )
    assert re.findall(r"^Job \d+: (.*)\.$", again.stdout, re.M) == ["Train chat-large"]
    assert records(clone) == before
    assert clone.planned() == [  # and not the other evaluation
        ("evaluate", "chat-large/gsm8k"),
        ("track", "evals/chat-large/gsm8k.samples.jsonl"),
        ("track", "runs/chat-large/model"),
    ]
    clone.run(SNAKEMAKE)
    assert clone.planned() == []
    assert not json.loads((clone.work / "runs/chat-large/provenance.json").read_text())["dirty"]  # results do not count
    clone.run("dvc push")
    assert held.exists()


def test_what_a_lost_artifact_is_made_from_is_looked_for_at_once(clone, tmp_path):
    (tmp_path / "empty").mkdir()
    clone.run(f"dvc remote modify --local storage url {tmp_path / 'empty'}")
    done = clone.run(f"cd {WORK} && python ../../workflow/cache.py fetch runs/modernbert-large.json", check=False)
    assert done.returncode == 2
    aside = {str(path.relative_to(clone.work / ".work/lost")) for path in clone.work.glob(".work/lost/*/*")}
    assert aside == {
        "runs/modernbert-large.json", "data/corpus--world--64.json", "downloads/pocket-world.json",
        "downloads/modernbert-large-untrained.json",
    }  # fmt: skip
    assert re.search("-- runs/modernbert-large.json( [a-z]+/[a-z0-9-]+.json){3}. Then start again", done.stdout)


@pytest.mark.parametrize("remote", ["a directory that is not there", "a server that does not answer"])
def test_a_remote_that_cannot_be_reached_changes_nothing(clone, tmp_path, remote):
    if remote == "a server that does not answer":
        clone.run("dvc remote add -f storage s3://bucket/dllm")
        clone.run("dvc remote modify storage endpointurl http://127.0.0.1:9 && git commit -qam remote")
    else:
        clone.run(f"dvc remote modify --local storage url {tmp_path / 'unmounted'}")
    keys = {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "k", "AWS_MAX_ATTEMPTS": "1"}
    done = clone.run(f"cd {WORK} && python ../../workflow/cache.py fetch runs/chat-large.json", check=False, **keys)
    assert done.returncode == 2
    assert re.fullmatch(
        r"error: runs/chat-large/model: cannot be fetched; nothing has changed. DVC says: .*\n", done.stdout
    )
    assert clone.run("git status --short").stdout == ""


def test_an_old_pointer_does_not_bring_back_old_content(clone):
    clone.run(f"dvc pull {CHAT}.dvc")
    record = clone.work / "runs/chat-large.json"
    record.write_text(record.read_text().replace(json.loads(record.read_text())["digest"], "0" * 64))
    shutil.rmtree(clone.path / CHAT)
    (clone.path / CHAT).mkdir()
    (clone.path / CHAT / "new").write_text("just trained")
    clone.run(f"cd {WORK} && python ../../workflow/cache.py fetch runs/chat-large.json")
    assert [path.name for path in (clone.path / CHAT).iterdir()] == ["new"]


def test_another_commit_and_back(clone):
    clone.run(f"dvc pull {CHAT}.dvc")
    old = directory_digest(clone.path / CHAT)
    clone.set_run("chat-large", seed=43)
    clone.run(f"{SNAKEMAKE} -- runs/chat-large/model.dvc && git add -A && git commit -qm other")
    new, planned = directory_digest(clone.path / CHAT), clone.planned()
    assert new != old
    assert {rule for rule, _ in planned} == {"evaluate", "track"}  # not asked for above
    for commit, digest, jobs in (("HEAD~1", old, []), ("main", new, planned)):
        clone.run(f"git checkout -q {commit} && dvc checkout {CHAT}.dvc")
        assert directory_digest(clone.path / CHAT) == digest
        assert clone.planned() == jobs


def test_settings_and_scores_of_two_commits_are_compared(clone):
    clone.set_run("chat-large", seed=43)
    metrics = clone.work / "tables/metrics.json"
    numbers = json.loads(metrics.read_text())
    numbers["scores"]["chat-large"]["mmlu"] += 50
    metrics.write_text(json.dumps(numbers))
    clone.run("git commit -qam other")
    settings = json.loads(clone.run("dvc params diff --json HEAD~1").stdout)
    assert settings == {"config/paper.yaml": {"runs.chat-large.seed": {"old": None, "new": 43}}}
    changed = json.loads(clone.run("dvc metrics diff --json HEAD~1").stdout)[f"{WORK}/tables/metrics.json"]
    assert {name: round(value["diff"]) for name, value in changed.items()} == {"scores.chat-large.mmlu": 50}


def test_artifacts_and_plots_can_be_had_from_outside(published, storage, tmp_path):
    published.run(f"cd {tmp_path} && dvc get -q {published.path} {CHAT} -o chat")
    assert directory_digest(tmp_path / "chat") == directory_digest(published.path / CHAT)
    published.run(f"dvc plots show chat pretraining -o {tmp_path / 'plots'}")
    assert "chat" in (tmp_path / "plots/index.html").read_text()
    names = json.loads(
        published.run("python -c 'import json, yaml; print(json.dumps(yaml.safe_load(open(\"dvc.yaml\"))))'").stdout
    )
    assert {artifact["path"] for artifact in names["artifacts"].values()} >= {CHAT}


def test_a_machine_without_dvc_gets_one_line(clone):
    (clone.path.parent / "bin-clone").mkdir()
    done = clone.run(f"cd {WORK} && python ../../workflow/cache.py fetch runs/chat-large.json", check=False)
    assert done.returncode == 2
    assert (
        done.stdout
        == "error: cache = 'dvc', but there is no dvc command; run `make dvc`, or set `cache: none` in an overlay\n"
    )


def test_every_artifact_of_the_plan_has_its_pointer(published):
    pointers = {str(path.relative_to(published.work)) for path in published.work.rglob("*.dvc")}
    answers = {f"evals/chat-large/{name}.samples.jsonl.dvc" for name in ("gsm8k", "mmlu")}
    assert pointers == {f"{artifact_of(record)}.dvc" for record in records(published)} | answers
    assert subprocess.run(["git", "check-ignore", "-q", CHAT], cwd=published.path).returncode == 0
