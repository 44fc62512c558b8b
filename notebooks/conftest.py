"""nbval compares all outputs of the notebooks, except those that differ on every machine. Without
cobble (`vlmkit fetch cobble`), the chapter about cobble is skipped."""

import pytest

from vlmkit.catalog.bundled import BUNDLED

ABOUT_COBBLE = ("06_the_recipe.ipynb",)


def pytest_collectstart(collector):
    """Do not compare stderr, which has warnings and progress bars."""
    if hasattr(collector, "skip_compare"):
        collector.skip_compare += ("stderr",)


def pytest_collection_modifyitems(items):
    if BUNDLED["cobble"].is_current:
        return
    for item in items:
        if item.path.name in ABOUT_COBBLE:
            item.add_marker(pytest.mark.skip(reason="cobble is not fetched: vlmkit fetch cobble"))
