"""Finds the Chromium that the test in a browser uses, and has one installed if there is none.

    python scripts/chromium.py              # prints its path
    python scripts/chromium.py --install    # downloads playwright's own first if there is none

Looked at are the environment variable CHROMIUM, the names that Chromium and Chrome usually have on
PATH, and what `playwright install chromium` has downloaded, in this order.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
MISSING = (
    "No Chromium was found: not in the environment variable CHROMIUM, not on PATH ("
    + ", ".join(NAMES)
    + "), and none of playwright's own. Install your system's (Debian and Ubuntu: apt install "
    "chromium), or download playwright's: .venv/bin/python -m playwright install chromium"
)


def find():
    """The path of a Chromium, or None."""
    named = os.environ.get("CHROMIUM")
    if named:
        return shutil.which(named)
    found = next(filter(None, map(shutil.which, NAMES)), None)
    return found or of_playwright()


def of_playwright():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        path = playwright.chromium.executable_path
    return path if Path(path).exists() else None


def main():
    if not find() and "--install" in sys.argv:
        subprocess.run([sys.executable, "-m", "playwright", "install", "chromium"], check=False)
    found = find()
    if not found:
        sys.exit(MISSING)
    print(found)


if __name__ == "__main__":
    main()
