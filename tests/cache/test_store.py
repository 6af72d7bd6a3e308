"""The store of downloads and DVC's cache: a large file is once on the disk, under the names of both."""

import os
import random
import sys

import pytest

from dllm.config import write_when_changed
from dllm.provenance import VOLATILE, directory_digest, read_record
from tests.cache.conftest import WORK, copy_sources
from tests.data.test_download import model_config
from tests.hub_commands import hub_environment
from tests.loopback_hub import LoopbackHub
from tests.stock import save_stock

LARGE = 3 * 2**20


@pytest.fixture
def fetched(tmp_path, commands):
    """(hub, checkout, download): a project whose model is fetched from a hub, and a function that fetches it."""
    directory = tmp_path / "served/models/large/toy"
    save_stock(directory.parent, "bert").rename(directory)
    (directory / "large.safetensors").write_bytes(random.Random(0).randbytes(LARGE))
    checkout = copy_sources(tmp_path / "dllm", commands)
    with LoopbackHub(tmp_path / "served") as hub:
        write_when_changed(
            checkout.path / "toy.yaml", model_config("toy", "large/toy", hub.commit("models", "large/toy"))
        )
        known = hub_environment(hub.url, tmp_path / "home")
        variables = {name: value for name, value in known.items() if name.startswith("HF_") and name != "HF_HOME"}

        def download(work: str):
            hub.requests.clear()
            done = checkout.run(f"{sys.executable} -m dllm download toy.yaml --workdir {work}", **variables)
            asked = [path for method, path, _ in hub.requests if method == "GET" and path.endswith("large.safetensors")]
            return len(asked), done.stdout

        yield checkout, download


def cache(checkout, words: str, check: bool = True):
    return checkout.run(f"cd {WORK} && {sys.executable} ../../workflow/cache.py {words}", check=check)


def test_a_tracked_download_a_store_and_other_work_directories_share_a_file_and_none_harms_another(fetched):
    checkout, download = fetched
    assert download(WORK)[0] == 1 and download("results/other")[0] == 0
    record = read_record(checkout.work / "downloads/toy.json")
    (blob,) = [path for path in (checkout.path / "results/hub").rglob("blobs/*") if path.stat().st_size == LARGE]
    mine, other = (checkout.path / work / "downloads/toy/large.safetensors" for work in (WORK, "results/other"))

    def whole(work: str) -> bool:
        digest = directory_digest(checkout.path / work / "downloads/toy", VOLATILE)["digest"]
        return digest == record["digest"]

    cache(checkout, "track downloads/toy.json downloads/toy")
    assert mine.samefile(blob) and other.samefile(blob), "one inode on the disk"
    assert os.stat(blob).st_nlink == 4 and os.stat(blob).st_mode & 0o777 == 0o444
    assert whole(WORK) and whole("results/other")

    checkout.run(f"rm -rf {WORK}/downloads/toy")
    cache(checkout, "fetch downloads/toy.json")
    assert whole(WORK) and mine.samefile(blob)

    checkout.run("rm -rf results/hub results/other")
    assert whole(WORK) and download("results/other")[0] == 1 and whole("results/other")
    assert read_record(checkout.path / "results/other/downloads/toy.json") == record


def test_what_is_damaged_under_one_name_is_removed_under_all_and_fetched_again(fetched):
    checkout, download = fetched
    download(WORK)
    cache(checkout, "track downloads/toy.json downloads/toy")
    file = checkout.work / "downloads/toy/large.safetensors"
    os.chmod(file, 0o644)
    file.write_bytes(b"x" * LARGE)  # as a failing disk does: under all names
    assert "damaged, removed" in cache(checkout, "verify", check=False).stdout
    assert not file.exists()
    assert download("results/other")[0] == 1, "it is not linked from the store as it is"
    assert "every cached object is what its name says" in cache(checkout, "verify").stdout
