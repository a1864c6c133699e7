"""What others write programs against stays as it is: names and signatures of everything public."""

from __future__ import annotations

import public_names


def test_public_names_and_signatures_are_as_written_down():
    """A change on purpose is listed in CHANGELOG.md, and public_names.txt written anew."""
    written, found = public_names.WRITTEN.read_text().splitlines(), public_names.lines()
    gone, new = sorted(set(written) - set(found)), sorted(set(found) - set(written))
    assert not gone and not new, f"gone or changed: {gone}; new or changed: {new}"
