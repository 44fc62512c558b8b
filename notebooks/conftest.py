"""nbval compares all outputs of the notebooks, except those that differ on every machine."""


def pytest_collectstart(collector):
    """Do not compare stderr, which has warnings and progress bars."""
    if hasattr(collector, "skip_compare"):
        collector.skip_compare += ("stderr",)
