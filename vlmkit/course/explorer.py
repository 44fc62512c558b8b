"""Explorer: what a model needs, in a notebook, while plan, images, tokens and rank are turned.

    vk.course.explorer.memory("Qwen/Qwen2.5-VL-7B-Instruct")

It needs ipywidgets, which comes with the course. Without a running kernel, as in a notebook that is
only looked at, it stands still.
"""

import base64
import html
import io

from vlmkit.anatomy import anatomy
from vlmkit.backend.quiet import quiet
from vlmkit.errors import DependencyError, SizeError, VlmkitError
from vlmkit.figures import bytes_by_component
from vlmkit.finetuning import LoRA
from vlmkit.formats import FORMATS
from vlmkit.memory import predict
from vlmkit.memory.ledger import ACTIVATION, ADAPTER, CACHE, GRADIENT, INPUT, OPTIMIZER, UPCAST
from vlmkit.plan import Plan

try:
    import ipywidgets as widgets
except ImportError as error:
    raise DependencyError(
        "The explorer is made of ipywidgets, which is not installed: pip install -c "
        "constraints.txt -e .[course]"
    ) from error

TRAINING = "adapters and training"
PARTS = {
    "kv cache": (CACHE,),
    "activations": (ACTIVATION, INPUT),
    TRAINING: (ADAPTER, UPCAST, GRADIENT, OPTIMIZER),
}
"""The bars below the two of everything, by kind of bytes; what is in none of them are weights."""
RANKS = (0, 4, 8, 16, 32, 64)


def memory(name="pebble", *, images=0, tokens=0, image_size=None):
    """A widget of the memory that `name` needs: bars that follow the plan, the images and tokens of
    a prompt, and the rank of adapters that are trained on the language model.

    name: "pebble", a folder, a hub id, a model of the catalog, or a transformers config.
    images, tokens: to begin with. image_size: (width, height) of each image, in pixels.

    Returns a MemoryExplorer. Raises DependencyError without ipywidgets, SizeError for numbers that
    cannot be, and what `vk.anatomy` and `vk.memory.predict` raise; what is turned to later and
    cannot be is said in the widget.
    """
    for what, number in (("images", images), ("tokens", tokens)):
        if type(number) is not int or number < 0:  # a slider would move it into its range
            raise SizeError(f"{what} is a whole number from 0 on, not {number!r}")
    return MemoryExplorer(name, images, tokens, image_size)


class MemoryExplorer(widgets.VBox):
    """`plan` (a dict of dropdowns by component), `images`, `tokens` and `rank` are the controls;
    `ledger` is what they come to, `axes` its picture, `message` what is wrong."""

    def __init__(self, name, images=0, tokens=0, image_size=None):
        self.name = name
        self.image_size = image_size
        self.ledger = self.axes = None
        self._known = {}
        has = [c for c, part in anatomy(name).parts.items() if part.parameters]
        start = Plan.recommended()
        wide = {"style": {"description_width": "9em"}, "layout": {"width": "23em"}}
        self.plan = {
            component: widgets.Dropdown(
                options=list(FORMATS), value=start[component], description=component, **wide
            )
            for component in has
        }
        slow = {"continuous_update": False, **wide}
        self.images = widgets.IntSlider(images, 0, max(16, images), description="images", **slow)
        self.tokens = widgets.IntSlider(
            tokens, 0, max(8192, tokens), 64, description="tokens of text", **slow
        )
        ranks = [(str(rank) if rank else "no training", rank) for rank in RANKS]
        self.rank = widgets.Dropdown(options=ranks, value=0, description="rank of LoRA", **wide)
        self._picture, self._said = widgets.HTML(), widgets.HTML()
        use = [self.images, self.tokens, self.rank]
        for control in (*self.plan.values(), *use):
            control.observe(self._turned, names="value")
        columns = widgets.HBox([widgets.VBox([*self.plan.values()]), widgets.VBox(use)])
        super().__init__([columns, self._picture, self._said])
        self._draw()

    def __repr__(self):
        return f"MemoryExplorer({self.name!r})"

    @property
    def message(self):
        """What is wrong with what the controls ask for, or nothing."""
        return html.unescape(self._said.value)

    def predicted(self, plan):
        """Ledger of the model under `plan`, for the use that the controls say."""
        images, tokens, rank = (c.value for c in (self.images, self.tokens, self.rank))
        key = (plan, images, tokens, rank)
        if key not in self._known:  # some seconds for a model of billions
            with quiet():
                self._known[key] = predict(
                    self.name,
                    plan,
                    images=images,
                    image_size=self.image_size if images else None,
                    tokens=tokens,
                    training={"language_model": LoRA(r=rank)} if rank else None,
                )
        return self._known[key]

    def _turned(self, change):
        try:
            self._draw()
        except VlmkitError as error:
            self._said.value = html.escape(str(error))
        else:
            self._said.value = ""

    def _draw(self):
        from matplotlib.figure import Figure

        chosen = Plan(**{component: control.value for component, control in self.plan.items()})
        ledger = self.predicted(chosen)
        bars = {"all in bf16": self.predicted("bf16"), "all, as chosen": ledger}
        parts = {part: sizes for part, sizes in parts_of(ledger).items() if any(sizes.values())}
        bars |= parts if len(parts) > 1 else {}
        figure = Figure(figsize=(8, 1.2 + 0.42 * len(bars)), layout="constrained")
        self.axes = bytes_by_component(bars, ax=figure.subplots())
        self.ledger = ledger
        self._png = _png(figure)
        text = html.escape(_in_words(bars))
        self._picture.value = (
            f'<img style="max-width: 100%" alt="{text}" src="data:image/png;base64,{self._png}"/>'
        )

    def _repr_mimebundle_(self, **kwargs):
        """As every widget, and as a picture for pages that show none."""
        return {**super()._repr_mimebundle_(**kwargs), "image/png": self._png}


def parts_of(ledger):
    """{part: {component: bytes}} of a Ledger: its weights, and the `PARTS`."""
    kinds = {kind: part for part, kinds in PARTS.items() for kind in kinds}
    parts = {part: {} for part in ("weights", *PARTS)}
    for entry in ledger.entries:
        sums = parts[kinds.get(entry.kind, "weights")]
        sums[entry.component] = sums.get(entry.component, 0) + entry.bytes
    return parts


def _in_words(bars):
    totals = {
        label: sum(getattr(bar, "by_component", bar).values()) / 10**6
        for label, bar in bars.items()
    }
    return "; ".join(f"{label}: {total:,.2f} MB" for label, total in totals.items())


def _png(figure):
    """A figure as PNG, in base64."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=100)
    return base64.b64encode(file.getvalue()).decode()
