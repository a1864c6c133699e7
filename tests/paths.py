"""Where things are."""

from pathlib import Path

SCRIPTS = Path(__file__).parent  # those that tests start as processes of their own
ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"  # real data, where there is some
