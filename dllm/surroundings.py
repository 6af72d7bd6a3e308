"""What a command finds around it: variables, the directory it is in, a place for caches. Each fault is one line."""

from __future__ import annotations

import os
from collections.abc import Mapping
from errno import EDQUOT, ENOSPC
from pathlib import Path

LAST_SECOND = 253_402_300_799
"""End of the year 9999, seconds after 1970: no later time has a date."""

NUMBERS = {
    "SOURCE_DATE_EPOCH": ("a whole number of seconds since 1970", 0, LAST_SECOND),
    "HF_HUB_DOWNLOAD_TIMEOUT": ("a whole number of seconds", 1, 86_400),
    "HF_HUB_ETAG_TIMEOUT": ("a whole number of seconds", 1, 86_400),
    "HF_DATASETS_IN_MEMORY_MAX_SIZE": ("a whole number of bytes", 0, 2**63),
}
"""Variables that a package reads as a number while it is loaded: what each is, and its least and greatest value."""


def check_surroundings(environment: Mapping[str, str] | None = None) -> None:
    """Raise ValueError, one line, for a variable that is no number where it must be, and a directory that is gone."""
    environment = os.environ if environment is None else environment
    for name, (kind, least, most) in NUMBERS.items():
        stated = environment.get(name)
        if stated is None:
            continue
        text = stated.strip()
        if not (text.isascii() and text.isdecimal() and least <= int(text[:30]) <= most):
            raise ValueError(
                f"{name} = {stated!r} in the environment is not {kind} from {least} to {most}; correct it or unset it"
            )
    try:
        os.getcwd()
    except OSError as error:
        raise ValueError(
            f"the current directory cannot be read ({error.strerror}), it was removed or moved; "
            "go to one that exists, with `cd .` where it was made again"
        ) from None


def unusable_cache(error: BaseException) -> str | None:
    """Why the hub's client cannot use its cache, with the next step; None if an error is of something else."""
    if not isinstance(error, OSError) or not isinstance(error.filename, str) or error.errno in (ENOSPC, EDQUOT):
        return None
    from huggingface_hub.constants import HF_HOME

    place, home = Path(error.filename), Path(HF_HOME)
    if not (place.is_relative_to(home) or home.is_relative_to(place)):
        return None
    return f"the cache of the hub, {home}, cannot be used ({error.strerror}); set HF_HOME to a directory for it"
