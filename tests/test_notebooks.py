"""Every notebook is committed as it ran: in order, to its end, with its outputs.

nbval (`make test`) runs the notebooks and compares outputs, but it accepts a notebook without
outputs and execution counts. So this file checks that they are there.
"""

import re
from pathlib import Path

import nbformat
import pytest

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
PATHS = sorted(FOLDER.rglob("*.ipynb"))

pytestmark = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)


def cells(path, kind):
    notebook = nbformat.read(path, as_version=4)
    return [cell for cell in notebook.cells if cell.cell_type == kind and cell.source.strip()]


def outputs(path):
    return [output for cell in cells(path, "code") for output in cell.outputs]


def test_is_a_valid_notebook_for_this_environments_kernel(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"


def test_was_run_from_top_to_bottom_with_outputs(path):
    counts = [cell.execution_count for cell in cells(path, "code")]
    assert counts == list(range(1, len(counts) + 1))
    assert outputs(path)


def test_ran_without_errors_and_warnings(path):
    for cell in cells(path, "code"):
        tolerated = "raises-exception" in cell.metadata.get("tags", [])
        kinds = [output.output_type for output in cell.outputs]
        assert tolerated or "error" not in kinds, cell.source
        printed = [output.text for output in cell.outputs if output.get("name") == "stderr"]
        assert not printed, f"on stderr: {printed[0][:200]}"


def test_outputs_hold_no_address_in_memory(path):
    """`<object at 0x7f...>` differs in every run, and tells a reader nothing."""
    for output in outputs(path):
        shown = str(output.get("text", "")) + str(output.get("data", {}).get("text/plain", ""))
        assert not re.search(r" at 0x[0-9a-f]{6,}", shown), shown[:200]


def test_pictures_in_the_text_have_alternative_text(path):
    for cell in cells(path, "markdown"):
        assert not re.search(r"!\[\s*\]\(", cell.source), cell.source
        for image in re.findall(r"<img [^>]*>", cell.source):
            assert re.search(r'alt="[^"]+"', image), image
