"""Draws docs/first_result.png, which the README and the site's first page show.

    python scripts/first_result.py

A photograph, a question about it, cobble's answer under the recommended plan, and what each
component weighs. The photograph is "Chelsea the cat" by Stefan van der Walt, which comes with
scikit-image; it is CC0, so that it may be shown here.
"""

import textwrap
from pathlib import Path

from matplotlib.figure import Figure

import vlmkit as vk
from vlmkit.course import pictures

FILE = Path(__file__).resolve().parent.parent / "docs" / "first_result.png"
PLANS = {"language_model\nin bf16": "bf16", "language_model\nin nf4": vk.Plan.recommended()}


def draw(answer):
    """The figure, with `answer` as the answer."""
    figure = Figure(figsize=(8.6, 3.1), dpi=100, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(4, 5))
    left.imshow(vk.images.read(pictures.photograph()))
    left.set_axis_off()
    text = textwrap.fill(f"→ {answer}", 44)
    left.set_title(f"{pictures.ABOUT_PHOTOGRAPHS}\n{text}", y=-0.06, va="top", fontsize=12)
    vk.figures.bytes_by_component(
        {label: vk.memory.predict("cobble", plan) for label, plan in PLANS.items()}, ax=right
    )
    return figure


if __name__ == "__main__":
    model, processor = vk.load("cobble")
    answer = vk.ask(model, processor, pictures.photograph(), pictures.ABOUT_PHOTOGRAPHS)
    print(answer)
    draw(answer).savefig(FILE)
