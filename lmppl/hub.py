"""Whether the Hugging Face hub can be reached: where it cannot, libraries would go on trying for half a minute."""

from __future__ import annotations

import socket
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import constants

PATIENCE = 5.0  # seconds in which somebody has to answer


def out_of_reach(name: str) -> bool:
    """Whether a name can be found only among what was fetched before: it is no path, and the hub does not answer."""
    if Path(name).exists():
        return False
    return constants.HF_HUB_OFFLINE or not (getproxies() or answers(constants.ENDPOINT))


def answers(url: str) -> bool:
    """Whether somebody listens there."""
    parts = urlsplit(url)
    port = parts.port or (80 if parts.scheme == "http" else 443)
    try:
        socket.create_connection((parts.hostname or "", port), timeout=PATIENCE).close()
    except OSError:
        return False
    return True


def unreachable() -> str:
    """What to say of a name that is not found then."""
    return f"there is no such directory, and {constants.ENDPOINT} cannot be reached"
