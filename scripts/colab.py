"""Install vlmkit into an environment that has packages already, such as Colab's.

    !git clone --depth 1 https://github.com/OWNER/vlmkit course
    %run course/scripts/colab.py

The installed packages keep their versions, which pip gets as constraints, and pip installs only
what is missing. If that is impossible, some installed packages may become newer, but never older.
PyTorch and the packages built for it always stay. vlmkit itself is installed without dependencies.
"""

import importlib
import subprocess
import sys
import tempfile
import tomllib
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY = "OWNER/vlmkit"
"""The repository on GitHub: a placeholder, because it has no public address yet. docs/running.md
and the first cell of scripts/colab.ipynb use the same one; a test compares them. The links of the
site to Colab and Binder come from it (docs/extensions/chapter_links.py)."""

COURSE = Path(__file__).resolve().parent.parent
BUILT_TOGETHER = {"torch", "torchvision", "torchaudio"}
"""Replacing one of these breaks the others, or loses the GPU."""


@dataclass(frozen=True)
class Decision:
    """What to do with the packages that vlmkit needs: four lists of requirements."""

    fine: list
    missing: list
    too_old: list
    too_old_but_kept: list

    @property
    def wanted(self):
        """What pip should install."""
        return [*self.missing, *self.too_old]


def needed():
    """The requirements of vlmkit itself, as text."""
    text = (COURSE / "pyproject.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)["project"]["dependencies"]


def installed(path=None):
    """{name: version} of the packages installed here, or in the folders `path`."""
    found = metadata.distributions() if path is None else metadata.distributions(path=path)
    versions = {}
    for distribution in found:  # if two have the same name, Python imports the first
        name = distribution.metadata["Name"]
        if name:
            versions.setdefault(canonicalize_name(name), distribution.version)
    return versions


def decide(requirements, versions):
    """Decision on `requirements`, where `versions` are installed."""
    fine, missing, too_old, kept = [], [], [], []
    for text in requirements:
        requirement = Requirement(text)
        name = canonicalize_name(requirement.name)
        found = versions.get(name)
        if found is None:
            missing.append(text)
        elif requirement.specifier.contains(found, prereleases=True):
            fine.append(text)
        else:
            (kept if name in BUILT_TOGETHER else too_old).append(text)
    return Decision(fine, missing, too_old, kept)


def constraints(versions, decision, *, may_become_newer=False):
    """Lines for pip: installed packages stay, or (`may_become_newer`) do not become older."""
    moving = {canonicalize_name(Requirement(text).name) for text in decision.too_old}
    lines = []
    for name, version in sorted(versions.items()):
        newer = name not in BUILT_TOGETHER and (may_become_newer or name in moving)
        # A lower bound cannot name a build, such as the +cu128 of 2.13.0+cu128.
        lines.append(f"{name}>={version.partition('+')[0]}" if newer else f"{name}=={version}")
    return lines


def install(requirements=None, versions=None, *, pip=(sys.executable, "-m", "pip"), options=()):
    """Install what is missing. Returns the Decision; raises RuntimeError if pip cannot do it.

    pip: the command. options: more arguments of `pip install`.
    """
    versions = installed() if versions is None else versions
    decision = decide(needed() if requirements is None else requirements, versions)
    for text in decision.too_old_but_kept:
        name = canonicalize_name(Requirement(text).name)
        print(
            f"{name} {versions[name]} stays, although vlmkit was tested with {text}: replacing it "
            "would break the packages that were built for it. If something fails, this may be why."
        )
    ways = (False, True) if decision.wanted else ()
    for may_become_newer in ways:
        lines = constraints(versions, decision, may_become_newer=may_become_newer)
        if _pip_install(pip, options, decision.wanted, lines):
            break
        if not may_become_newer:
            print("Not possible with all installed versions. Trying again with newer ones allowed:")
    else:
        if ways:
            raise RuntimeError(
                f"pip could not install {', '.join(decision.wanted)} without making something else "
                "older: see its reason above. Nothing was changed. Try a new runtime, or one with "
                "newer packages."
            )
    return decision


def _pip_install(pip, options, wanted, lines):
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "constraints.txt"
        file.write_text("\n".join(lines), encoding="utf-8")
        command = [*pip, "install", *options, "--constraint", str(file), *wanted]
        return subprocess.run(command).returncode == 0


def main():
    before = installed()
    decision = install(versions=before)
    command = [sys.executable, "-m", "pip", "install", "--no-deps", str(COURSE)]
    if subprocess.run(command).returncode:
        raise RuntimeError(f"pip could not install vlmkit from {COURSE}: see its reason above.")
    importlib.invalidate_caches()  # Python has already listed the folder of packages
    after = installed()
    changed = [
        f"{name} {version} -> {after.get(name, 'gone')}"
        for name, version in before.items()
        if after.get(name) != version and name != "vlmkit"
    ]
    print(f"Already installed: {len(decision.fine)} of the {len(needed())} packages vlmkit needs.")
    print(f"Installed: {', '.join(decision.missing) or 'only vlmkit'}.")
    print(f"Changed: {', '.join(changed) or 'nothing'}.")
    loaded = [name for line in changed if (name := line.split()[0]) in sys.modules]
    if loaded:
        print(f"{', '.join(loaded)} was imported before: choose Runtime, Restart session.")


if __name__ == "__main__":
    main()
