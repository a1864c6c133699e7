"""Whether the Hugging Face hub can be reached. If not, libraries would try for half a minute."""

from __future__ import annotations

import socket
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import constants

PATIENCE = 5.0  # seconds to wait for a connection


def out_of_reach(name: str) -> bool:
    """Returns whether a name is no path and the hub is unreachable, so that only files fetched before can be used."""
    if Path(name).exists():
        return False
    return constants.HF_HUB_OFFLINE or not (getproxies() or answers(constants.ENDPOINT))


def answers(url: str) -> bool:
    """Returns whether a server listens at this address."""
    parts = urlsplit(url)
    port = parts.port or (80 if parts.scheme == "http" else 443)
    try:
        socket.create_connection((parts.hostname or "", port), timeout=PATIENCE).close()
    except OSError:
        return False
    return True


def unreachable() -> str:
    """Returns the message for a name that is not found when the hub is unreachable."""
    return f"there is no such directory, and {constants.ENDPOINT} cannot be reached"
