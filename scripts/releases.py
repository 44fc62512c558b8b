"""Make the two archives of the course from the last commit: `make releases`.

build/releases/vlmkit-VERSION-students.zip has no solutions: no notebooks/solutions, no solutions in
the metadata of the chapters' exercises, no quiz with answers, no notes for teachers, and no tests,
which hold right and wrong answers. Links to what is left out become plain text. The other archive,
for teachers, has everything.
"""

import io
import json
import re
import subprocess
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "releases"
LEFT_OUT = re.compile(r"(notebooks/solutions|tests)/|docs/(quiz|solutions|teaching)\.md$")
GONE = r"\((?:\.\./)*(?:docs/|notebooks/)?(?:quiz|solutions|teaching)\b[^)]*\)"
"""The target of a link to what is left out."""
CHAPTER = re.compile(r"notebooks/\d\d_\w+\.ipynb$")


def version():
    text = (ROOT / "vlmkit" / "__init__.py").read_text(encoding="utf-8")
    return re.search(r'__version__ = "(.+?)"', text)[1]


def committed():
    """{path: (bytes, mode)} of the files of the last commit."""
    archive = subprocess.run(
        ["git", "archive", "--format=tar", "HEAD"], cwd=ROOT, capture_output=True, check=True
    )
    with tarfile.TarFile(fileobj=io.BytesIO(archive.stdout)) as tar:
        members = [member for member in tar.getmembers() if member.isfile()]
        return {one.name: (tar.extractfile(one).read(), one.mode) for one in members}


def for_students(files):
    """The files that students get: {path: (bytes, mode)}."""
    kept = {path: file for path, file in files.items() if not LEFT_OUT.match(path)}
    for path, (data, mode) in kept.items():
        if CHAPTER.match(path):
            kept[path] = unsolved(data), mode
        elif path.endswith(".md"):
            kept[path] = without_links(data.decode()).encode(), mode
    return kept


def without_links(text):
    """Markdown without links to what is left out, and without their pages in a toctree."""
    sentence = rf"[A-Z](?:[^.()\n]|\n(?!\n))*\[solutions\]{GONE}[^.]*\."
    text = re.sub(sentence, "Your teacher has the solutions.", text)
    text = re.sub(r"^(?:quiz|solutions|teaching)\n", "", text, flags=re.M)
    return re.sub(rf"\[([^\]]+)\]{GONE}", r"\1", text)


def unsolved(data):
    """A notebook without solutions in its metadata, and without links to their notebooks."""
    notebook = json.loads(data)
    for cell in notebook["cells"]:
        cell["metadata"].pop("solution", None)
        if cell["cell_type"] == "markdown":
            text = without_links("".join(cell["source"]))
            cell["source"] = text.splitlines(keepends=True)
    return (json.dumps(notebook, indent=1, ensure_ascii=False) + "\n").encode()


def write(name, files):
    """Write the zip file of `files`. The same files give the same bytes."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    top = f"vlmkit-{version()}"
    path = FOLDER / f"{top}-{name}.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file, (data, mode) in sorted(files.items()):
            entry = zipfile.ZipInfo(f"{top}/{file}")
            entry.external_attr, entry.compress_type = mode << 16, zipfile.ZIP_DEFLATED
            archive.writestr(entry, data)
    return path


def main():
    files = committed()
    for name, given in {"students": for_students(files), "teachers": files}.items():
        path = write(name, given)
        size = path.stat().st_size / 10**6
        print(f"{path.relative_to(ROOT)}: {len(given):,} files, {size:.1f} MB")


if __name__ == "__main__":
    main()
