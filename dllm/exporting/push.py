"""An export on the hub: a repository, and one commit with every file of the directory."""

from __future__ import annotations

from pathlib import Path

from dllm.data.hub import one_line_errors
from dllm.exporting.export import is_export


def check_push(repository: str) -> None:
    """Raise ValueError, one line, for a name that no repository has, and where no token of the hub is known."""
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise ValueError(f"HUB_ID = {repository!r}: {' '.join(str(error).split())}") from None
    if not get_token():
        raise ValueError(
            f"{repository}: no token of the hub, and an upload needs one that may write; set HF_TOKEN, or run "
            "`hf auth login`"
        )


def push(directory: str | Path, repository: str, *, private: bool = False, branch: str | None = None) -> str:
    """Upload an export as one commit of a hub repository, which is made if it is not there; returns its address.

    private: of a repository that is made now. branch: where the commit goes (None: main); it is made from main if it
    is not there. Files that are there already are not sent again. Raises ValueError, one line, for a directory that is
    no export, and for what `check_push` or the hub refuses.
    """
    from huggingface_hub import HfApi

    if not is_export(directory):
        raise ValueError(f"{directory}: no export; make one with `dllm export`")
    check_push(repository)
    api, place = HfApi(), repository + (f"@{branch}" if branch else "")
    with one_line_errors(place, repository, "repository", failed="the upload broke off"):
        api.create_repo(repository, private=private or None, exist_ok=True)
        if branch:
            api.create_branch(repository, branch=branch, exist_ok=True)
        message = f"Upload of {Path(directory).name}"
        try:
            done = api.upload_folder(repo_id=repository, folder_path=directory, revision=branch, commit_message=message)
        except RuntimeError as error:  # what the client makes of a file that broke off
            raise OSError(str(error.__cause__ or error)) from None
    return str(done.commit_url)
