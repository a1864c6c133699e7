"""Takes pictures of the site's main pages as a browser shows them, light and dark, wide and narrow.

make docs screenshots     # needs chromium; the pictures are in out/screenshots
"""

from __future__ import annotations

import subprocess
import tempfile
from itertools import product
from pathlib import Path

SITE = Path("out/docs").resolve()
OUT = Path("out/screenshots")
PAGES = ["index", "start", "results-pretrained", "performance", "api/samplers", "api/distributions", "api/cli"]
SCHEMES = {"light": 1, "dark": 0}  # of the browser's setting
WIDTHS = [1280, 390]
HEIGHT = 1800


def main() -> None:
    OUT.mkdir(parents=True, exist_ok=True)
    tutorials = sorted(str(p.relative_to(SITE).with_suffix("")) for p in SITE.glob("tutorials/*.html"))
    for page, scheme, width in product(PAGES + tutorials, SCHEMES, WIDTHS):
        take(page, scheme, width)


def take(page: str, scheme: str, width: int) -> None:
    """In a frame, because a browser's own window is not as narrow as a telephone."""
    with tempfile.TemporaryDirectory() as folder:
        frame = Path(folder, "frame.html")
        source = (SITE / f"{page}.html").as_uri()
        style = f"border:0;width:{width}px;height:{HEIGHT}px;color-scheme:{scheme}"
        frame.write_text(f'<body style="margin:0"><iframe src="{source}" style="{style}"></iframe>')
        picture = OUT / f"{page.replace('/', '-')}-{scheme}-{width}.png"
        browser = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-quic"]
        browser += ["--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
        browser += [f"--user-data-dir={folder}/profile", f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}"]
        browser += [f"--window-size={width},{HEIGHT}", f"--screenshot={picture.resolve()}", frame.as_uri()]
        subprocess.run(browser, check=True, stderr=subprocess.DEVNULL, timeout=120)
        print(picture)


if __name__ == "__main__":
    main()
