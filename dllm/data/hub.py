"""Errors of the model hub, each in one line with the next step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from dllm.surroundings import unusable_cache


class HubUnreachable(ValueError):
    """No answer from the hub: no network, or a broken connection."""


class NoSuchCommit(ValueError):
    """A repository that has no commit of this name."""


@contextmanager
def one_line_errors(pin: str, name: str, what: str, *, failed: str = "the download broke off") -> Iterator[None]:
    """Turn what the hub's client raises into a ValueError of one line.

    pin: repository and commit as shown; name: the entry; what: `model` or `dataset`; failed: the words for an error of
    the network. Raises HubUnreachable for such an error, so that the same command may succeed later.
    """
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except GatedRepoError:
        raise ValueError(f"{pin}: gated; accept its terms on the hub and set HF_TOKEN, then run again") from None
    except RevisionNotFoundError:
        raise NoSuchCommit(
            f"{pin}: the repository has no such commit; correct `revision` of {name!r} (`dllm check` shows its newest)"
        ) from None
    except LocalEntryNotFoundError as error:  # also an EntryNotFoundError: nothing in the cache, and no network
        raise _unreachable(pin, failed, error) from None
    except (RepositoryNotFoundError, EntryNotFoundError):
        raise ValueError(
            f"{pin}: no such {what} on the hub; correct `hub` of {name!r}, or set HF_TOKEN if it is private"
        ) from None
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status in (401, 403):
            raise ValueError(f"{pin}: the hub refuses access ({status}); set HF_TOKEN to a valid token") from None
        raise _unreachable(pin, failed, error) from None
    except HfHubHTTPError.__bases__ as error:  # type: ignore[misc]  # every error of the HTTP library, and OSError
        if why := unusable_cache(error):
            raise ValueError(f"{pin}: {why}") from None
        if isinstance(error, OSError) and error.filename:  # of this disk: no other network would help
            raise
        raise _unreachable(pin, failed, error) from None


def _unreachable(pin: str, failed: str, error: Exception) -> HubUnreachable:
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return HubUnreachable(f"{pin}: {failed} ({first}); check the network and run again")
