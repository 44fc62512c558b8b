"""Planning: the best plan under a budget of bytes, measured, and verified on held-out questions.

    result = vk.planner.best_plan(model, processor, dataset, budget="3 MB")
    vk.load("pebble", plan=result.plan)

    planner = vk.planner.Planner(model, processor, dataset, formats="experimental", by="layer")
    planner.best("2 MB"), planner.best("1.5 MB")        # the damages are measured once for all
    planner.frontier()                                  # planned against uniform, as a DataFrame

parts.py       what can be given a format of its own, and what that costs in bytes
rounding.py    what loading in a format does to weights and inputs, done in place
choosing.py    the least damage within a number of bytes: a knapsack
splitting.py   calibration questions and held-out ones
planning.py    calibration, choice and verification
comparing.py   one plan against another on the same questions
results.py     what comes of it, as a table
"""

from vlmkit.planner.choosing import least_damage
from vlmkit.planner.parts import EXPERIMENTAL
from vlmkit.planner.planning import Planner, best_plan
from vlmkit.planner.results import Measured, Result, Trial
from vlmkit.planner.splitting import split

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
