"""How nbval compares the notebooks: strictly, but for what no two machines print alike."""


def pytest_collectstart(collector):
    """Leave stderr (warnings, progress bars) out of the comparison; nbval compares the rest."""
    if hasattr(collector, "skip_compare"):
        collector.skip_compare += ("stderr",)
