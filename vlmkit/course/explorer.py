"""Explorer: a widget that shows what memory a model needs, while you change plan, images, tokens
and rank.

    vk.course.explorer.memory("Qwen/Qwen2.5-VL-7B-Instruct")

It needs ipywidgets, which comes with the course. Without a running kernel, for example in a
notebook on a web page, it is a picture.
"""

import base64
import html
import io

from vlmkit.adapters import LoRA
from vlmkit.anatomy import anatomy
from vlmkit.backend.quiet import quiet
from vlmkit.catalog.gpus import GPUS, RESERVED
from vlmkit.errors import DependencyError, SizeError, VlmkitError
from vlmkit.figures import bytes_by_component
from vlmkit.formats import FORMATS
from vlmkit.memory import predict
from vlmkit.memory.fitting import room_on
from vlmkit.memory.ledger import ACTIVATION, ADAPTER, CACHE, GRADIENT, INPUT, OPTIMIZER, UPCAST
from vlmkit.plan import Plan
from vlmkit.units import GIGABYTE, MEGABYTE

try:
    import ipywidgets as widgets
except ImportError as error:
    raise DependencyError(
        "The explorer needs ipywidgets, which is not installed: pip install -c constraints.txt -e "
        ".[course]"
    ) from error

PARTS = {
    "kv cache": (CACHE,),
    "activations": (ACTIVATION, INPUT),
    "adapters and training": (ADAPTER, UPCAST, GRADIENT, OPTIMIZER),
}
"""The kinds of bytes in each bar below the two totals. All other kinds are weights."""
RANKS = (0, 4, 8, 16, 32, 64)


def memory(name="pebble", *, images=0, tokens=0, image_size=None):
    """A widget for the memory that `name` needs. Its bars follow the plan, the images and tokens of
    a prompt, and the rank of adapters that are trained on the language model.

    name: "pebble", a folder, a hub id, a model of the catalog, or a transformers config.
    images, tokens: the first values. image_size: (width, height) of each image, in pixels.

    Returns a MemoryExplorer. Raises DependencyError without ipywidgets, SizeError for impossible
    numbers, and what `vk.anatomy` and `vk.memory.predict` raise. The widget shows the errors of
    later values.
    """
    for what, number in (("images", images), ("tokens", tokens)):
        if type(number) is not int or number < 0:  # a slider would move it into its range
            raise SizeError(f"{what} should be a whole number from 0 on, not {number!r}")
    return MemoryExplorer(name, images, tokens, image_size)


class MemoryExplorer(widgets.VBox):
    """The controls are `plan` (a dict of dropdowns by component), `images`, `tokens`, `rank` and
    `card`. `ledger` is the prediction for them, `axes` its picture, `verdict` whether it fits on
    the card, `message` the error, if there is one.
    """

    def __init__(self, name, images=0, tokens=0, image_size=None):
        self.name, self.image_size = name, image_size
        self.ledger = self.axes = None
        self._known = {}
        wide = {"style": {"description_width": "9em"}, "layout": {"width": "23em"}}
        recommended = Plan.recommended()
        self.plan = {
            component: widgets.Dropdown(
                options=list(FORMATS), value=recommended[component], description=component, **wide
            )
            for component, part in anatomy(name).parts.items()
            if part.parameters
        }
        slow = {"continuous_update": False, **wide}
        self.images = widgets.IntSlider(images, 0, max(16, images), description="images", **slow)
        self.tokens = widgets.IntSlider(
            tokens, 0, max(8192, tokens), 64, description="tokens of text", **slow
        )
        ranks = [(str(rank) if rank else "no training", rank) for rank in RANKS]
        self.rank = widgets.Dropdown(options=ranks, value=0, description="rank of LoRA", **wide)
        cards = [("none", None), *((card, card) for card in GPUS)]
        self.card = widgets.Dropdown(options=cards, value=None, description="card", **wide)
        self._picture, self._error, self._fits = (widgets.HTML() for _ in range(3))
        use = [self.images, self.tokens, self.rank, self.card]
        for control in (*self.plan.values(), *use):
            control.observe(self._changed, names="value")
        columns = widgets.HBox([widgets.VBox([*self.plan.values()]), widgets.VBox(use)])
        super().__init__([columns, self._picture, self._fits, self._error])
        self._draw()

    def __repr__(self):
        return f"MemoryExplorer({self.name!r})"

    @property
    def message(self):
        """What is wrong with the values of the controls, or an empty string."""
        return html.unescape(self._error.value)

    @property
    def verdict(self):
        """Whether the model fits on the card, in words; empty if no card is chosen."""
        return html.unescape(self._fits.value)

    def predicted(self, plan, allocator=None):
        """Ledger of the model under `plan`, for the images, tokens and rank of the controls."""
        images, tokens, rank = (c.value for c in (self.images, self.tokens, self.rank))
        key = (plan, images, tokens, rank, allocator)
        if key not in self._known:  # takes seconds for a model of billions
            with quiet():
                self._known[key] = predict(
                    self.name,
                    plan,
                    images=images,
                    image_size=self.image_size if images else None,
                    tokens=tokens,
                    allocator=allocator,
                    training={"language_model": LoRA(r=rank)} if rank else None,
                )
        return self._known[key]

    def _changed(self, change):
        try:
            self._draw()
        except VlmkitError as error:
            self._error.value = html.escape(str(error))
        else:
            self._error.value = ""

    def _draw(self):
        from matplotlib.figure import Figure

        plan = Plan(**{component: control.value for component, control in self.plan.items()})
        ledger = self.predicted(plan)
        bars = {"all in bf16": self.predicted("bf16").by_component}
        bars["all, as chosen"] = ledger.by_component
        parts = {part: sizes for part, sizes in parts_of(ledger).items() if any(sizes.values())}
        bars |= parts if len(parts) > 1 else {}
        figure = Figure(figsize=(8, 1.2 + 0.42 * len(bars)), layout="constrained")
        self.axes = bytes_by_component(bars, ax=figure.subplots())
        self.ledger = ledger
        self._fits.value = html.escape(self._judged(plan))
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=100)
        self._png = base64.b64encode(file.getvalue()).decode()
        totals = {label: sum(sizes.values()) / MEGABYTE for label, sizes in bars.items()}
        words = "; ".join(f"{label}: {total:,.2f} MB" for label, total in totals.items())
        self._picture.value = (
            f'<img style="max-width: 100%" alt="{html.escape(words)}" '
            f'src="data:image/png;base64,{self._png}"/>'
        )

    def _judged(self, plan):
        card = self.card.value
        if card is None:
            return ""
        left = (room_on(card) - self.predicted(plan, "cuda").total) / GIGABYTE
        fits = f"fits on {card}: {left:.1f} GB are left"
        fits = fits if left >= 0 else f"does not fit on {card}: {-left:.1f} GB too much"
        return f"It {fits} ({RESERVED} is reserved for CUDA and other programs)."

    def _repr_mimebundle_(self, **kwargs):
        """The widget, and a picture for pages without widgets."""
        return {**super()._repr_mimebundle_(**kwargs), "image/png": self._png}


def parts_of(ledger):
    """{part: {component: bytes}} of a Ledger: "weights", and the `PARTS`."""
    part_of = {kind: part for part, kinds in PARTS.items() for kind in kinds}
    parts = {part: {} for part in ("weights", *PARTS)}
    for entry in ledger.entries:
        sums = parts[part_of.get(entry.kind, "weights")]
        sums[entry.component] = sums.get(entry.component, 0) + entry.bytes
    return parts
