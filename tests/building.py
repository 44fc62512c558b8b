"""The site, built once for all tests that use it."""

import atexit
import functools
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from bs4 import BeautifulSoup

ROOT = Path(__file__).resolve().parent.parent
REPOSITORY = "someone/vlmkit"
"""Where the built site believes that the repository is."""


@functools.cache
def site():
    """(folder of the pages, finished process); the site is built as `make site` builds it."""
    folder = Path(tempfile.mkdtemp(prefix="site-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    options = ["-c", "docs", "-d", str(folder / "doctrees"), "-E", "-W", "--keep-going", "-q"]
    built = subprocess.run(
        [sys.executable, "-m", "sphinx", *options, "-j", "auto", ".", str(folder / "pages")],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "VLMKIT_REPOSITORY": REPOSITORY},
        capture_output=True,
        text=True,
    )
    return folder / "pages", built


@functools.cache
def page(path):
    """The parsed page."""
    return BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")
