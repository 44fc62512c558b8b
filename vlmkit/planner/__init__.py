"""Planning: the best plan within a budget of bytes, measured, and verified on held-out questions.

    result = vk.planner.best_plan(model, processor, dataset, budget="3 MB")
    vk.load("pebble", plan=result.plan)

    planner = vk.planner.Planner(model, processor, dataset, formats="experimental", by="layer")
    planner.best("2 MB"), planner.best("1.5 MB")        # the damages are measured once for both
    planner.frontier()                                  # planned against uniform, as a DataFrame

choices.py    the items that can get a format of their own, their bytes, and the knapsack
planning.py   calibration, choice and verification
results.py    the results, as tables, and the comparison of two plans
"""

from vlmkit.planner.choices import EXPERIMENTAL, least_damage
from vlmkit.planner.planning import Planner, best_plan, split
from vlmkit.planner.results import Measured, Result, Trial

__all__ = [
    "EXPERIMENTAL",
    "Measured",
    "Planner",
    "Result",
    "Trial",
    "best_plan",
    "least_damage",
    "split",
]
