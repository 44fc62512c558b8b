"""Explorers: what you can play with in a notebook.

    vk.course.explorer.memory("Qwen/Qwen2.5-VL-7B-Instruct")    # memory, as you change the plan
    vk.course.explorer.bits("pebble")                           # answers, as you take bits away
    vk.course.explorer.words(model, processor, image, "Describe the picture.")    # where it looked

Each is a widget for a reader whose notebook is running. In a notebook that a program runs, in one
that was exported, on a web page and without ipywidgets, it is pictures and tables instead.
"""

import base64
import contextlib
import html
import importlib.util
import io
import sys

from vlmkit.adapters import LoRA
from vlmkit.anatomy import anatomy
from vlmkit.backend.quiet import quiet
from vlmkit.catalog.gpus import GPUS, RESERVED
from vlmkit.errors import SensitivityError, SizeError, VlmkitError
from vlmkit.figures import attention, bytes_by_component
from vlmkit.formats import FORMATS
from vlmkit.memory import predict
from vlmkit.memory.fitting import room_on
from vlmkit.memory.ledger import ACTIVATION, ADAPTER, CACHE, GRADIENT, INPUT, OPTIMIZER, UPCAST
from vlmkit.plan import Plan
from vlmkit.units import GIGABYTE, MEGABYTE

WIDGET = "application/vnd.jupyter.widget-view+json"
WIDE = {"style": {"description_width": "9em"}, "layout": {"width": "23em"}}
SLOW = {"continuous_update": False, **WIDE}
"""Options of controls. A SLOW one changes nothing before the reader lets go of it."""


class Explorer:
    """Controls, and HTML that follows them. A subclass makes its controls with `_control`, calls
    `_show` with the lines of the widget, and writes the HTML in `_draw`. `message` is the error of
    the last change, or an empty string.

    If no widget can be shown, `widget` is None and the controls are `Control`s. Code can set their
    values all the same.
    """

    widget = None

    def __init__(self):
        self._picture, self._error = self._control("HTML", ""), self._control("HTML", "")

    def _control(self, kind, value, **options):
        if not widgets_move():
            return Control(value)
        import ipywidgets

        return getattr(ipywidgets, kind)(value=value, **options)

    def _show(self, controls, *lines):
        """Put lists of controls beside each other, and `lines` below them."""
        self._draw()
        for control in sum(controls, []):
            control.observe(self._changed, names="value")
        if not widgets_move():
            return
        from ipywidgets import HBox, VBox

        beside = HBox([VBox(each) for each in controls], layout={"flex_flow": "row wrap"})
        self.widget = VBox([beside, self._picture, *lines, self._error])

    def _changed(self, change=None):
        try:
            self._draw()
        except VlmkitError as error:
            self._error.value = html.escape(str(error))
        else:
            self._error.value = ""

    @property
    def message(self):
        return html.unescape(self._error.value)

    def still(self):
        """The HTML for a page on which nothing can be moved."""
        return self._picture.value

    def _repr_mimebundle_(self, include=None, exclude=None):
        if self.widget:
            shown = {
                WIDGET: self.widget._repr_mimebundle_()[WIDGET],
                "text/html": self._picture.value,
            }
        else:
            shown = {"text/html": self.still()}
        return {"text/plain": repr(self), **shown}


class Control:
    """A control that nobody sees: a value, and functions that are called when it is set."""

    def __init__(self, value):
        self._value, self._followers = value, []

    def observe(self, follower, names=None):
        self._followers.append(follower)

    @property
    def value(self):
        return self._value

    @value.setter
    def value(self, value):
        self._value = value
        for follower in self._followers:
            follower()


def widgets_move():
    """Whether there is ipywidgets, and no kernel in which nobody can move a widget. Programs that
    run a notebook (nbclient, nbconvert, nbval) say that they cannot answer `input()`. JupyterLab,
    VS Code and Colab can."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    kernel = getattr(shell, "kernel", None)
    reads = kernel is None or getattr(kernel, "_allow_stdin", True)
    return reads and importlib.util.find_spec("ipywidgets") is not None


def png_of(figure, words, dpi=100):
    """An <img> of a matplotlib figure, with its alternative text."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=dpi)
    return _img(file, words)


def thumbnail(image, side=72):
    """An <img> of a picture."""
    from vlmkit.images import read

    small, file = read(image).copy(), io.BytesIO()
    small.thumbnail((2 * side, 2 * side))  # sharp on screens with twice the pixels
    small.save(file, format="PNG")
    return _img(file, "the picture", f"width: {side}px; image-rendering: pixelated")


def _img(file, words, style="max-width: 100%"):
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img style="{style}" alt="{html.escape(words)}" src="data:image/png;base64,{data}"/>'


def table_of(head, rows):
    """An HTML table. The first cell of each row is its heading; cells are HTML."""
    head = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join(
        f"<tr><th>{first}</th>{''.join(f'<td>{cell}</td>' for cell in rest)}</tr>"
        for first, *rest in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


# --- memory --------------------------------------------------------------------------------------

PARTS = {
    "kv cache": (CACHE,),
    "activations": (ACTIVATION, INPUT),
    "adapters and training": (ADAPTER, UPCAST, GRADIENT, OPTIMIZER),
}
"""The kinds of bytes in each bar below the two totals. All other kinds are weights."""
RANKS = (0, 4, 8, 16, 32, 64)


def memory(name="pebble", *, images=0, tokens=0, image_size=None):
    """The memory that `name` needs, as a MemoryExplorer. Its bars follow the plan, the images and
    tokens of a prompt, and the rank of adapters that are trained on the language model.

    name: "pebble", a folder, a hub id, a model of the catalog, or a transformers config.
    images, tokens: the first values. image_size: (width, height) of each image, in pixels.

    Raises SizeError for impossible numbers, and what `vk.anatomy` and `vk.memory.predict` raise.
    The widget shows the errors of later values.
    """
    for what, number in (("images", images), ("tokens", tokens)):
        if type(number) is not int or number < 0:  # a slider would move it into its range
            raise SizeError(f"{what} should be a whole number from 0 on, not {number!r}")
    return MemoryExplorer(name, images, tokens, image_size)


class MemoryExplorer(Explorer):
    """The controls are `plan` (a dict of dropdowns by component), `images`, `tokens`, `rank` and
    `card`. `ledger` is the prediction for them, `axes` its picture, `verdict` whether it fits on
    the card.
    """

    def __init__(self, name, images=0, tokens=0, image_size=None):
        super().__init__()
        self.name, self.image_size = name, image_size
        self.ledger = self.axes = None
        self._known = {}
        recommended = Plan.recommended()
        self.plan = {
            component: self._control(
                "Dropdown",
                recommended[component],
                options=list(FORMATS),
                description=component,
                **WIDE,
            )
            for component, part in anatomy(name).parts.items()
            if part.parameters
        }
        self.images = self._control(
            "IntSlider", images, min=0, max=max(16, images), description="images", **SLOW
        )
        most = max(8192, tokens)
        self.tokens = self._control(
            "IntSlider", tokens, min=0, max=most, step=64, description="tokens of text", **SLOW
        )
        ranks = [(str(rank) if rank else "no training", rank) for rank in RANKS]
        self.rank = self._control("Dropdown", 0, options=ranks, description="rank of LoRA", **WIDE)
        cards = [("none", ""), *((card, card) for card in GPUS)]  # None would show an empty control
        self.card = self._control("Dropdown", "", options=cards, description="card", **WIDE)
        self._fits = self._control("HTML", "")
        use = [self.images, self.tokens, self.rank, self.card]
        self._show([[*self.plan.values()], use], self._fits)

    def __repr__(self):
        return f"MemoryExplorer({self.name!r})"

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

    def still(self):
        """The figure, and the same numbers as a table."""
        components = [c for c in self.plan if any(self._bars[bar].get(c) for bar in self._bars)]
        rows = [
            [bar, *(f"{s.get(c, 0) / MEGABYTE:,.2f}" for c in components), f"{_megabytes(s):,.2f}"]
            for bar, s in self._bars.items()
        ]
        return self._picture.value + table_of(["MB", *components, "total"], rows)

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
        self.ledger, self._bars = ledger, bars
        self._fits.value = html.escape(self._judged(plan))
        words = "; ".join(f"{label}: {_megabytes(sizes):,.2f} MB" for label, sizes in bars.items())
        self._picture.value = png_of(figure, words)

    def _judged(self, plan):
        card = self.card.value
        if not card:
            return ""
        left = (room_on(card) - self.predicted(plan, "cuda").total) / GIGABYTE
        fits = f"fits on {card}: {left:.1f} GB are left"
        fits = fits if left >= 0 else f"does not fit on {card}: {-left:.1f} GB too much"
        return f"It {fits} ({RESERVED} is reserved for CUDA and other programs)."


def parts_of(ledger):
    """{part: {component: bytes}} of a Ledger: "weights", and the `PARTS`."""
    part_of = {kind: part for part, kinds in PARTS.items() for kind in kinds}
    parts = {part: {} for part in ("weights", *PARTS)}
    for entry in ledger.entries:
        sums = parts[part_of.get(entry.kind, "weights")]
        sums[entry.component] = sums.get(entry.component, 0) + entry.bytes
    return parts


def _megabytes(sizes):
    return sum(sizes.values()) / MEGABYTE


# --- bits ----------------------------------------------------------------------------------------

BITS = (2, 3, 4, 5, 6, 7, 8, 16)
STILL = (4, 3, 2)
"""The bits that a page shows for each component, one component at a time."""


def bits(name="pebble", rows=None):
    """The answers of a model, and its bytes, as you take bits from its components: a BitsExplorer.

    name: what `vk.load` takes; the model is loaded in bf16. rows: questions as `vk.tasks` makes
    them; by default six that suit the model.

    The weights of the Linear layers are rounded to the nearest of 2^bits - 1 values, in groups of
    64 that share a scale (`vk.sensitivity.quantized` with "int4" and so on). Everything else stays
    in bf16. Raises the errors of `vk.load` and `vk.sensitivity.quantized`.
    """
    return BitsExplorer(name, rows)


class BitsExplorer(Explorer):
    """`bits` is a dict of sliders by component. `answers` are the answers under them, and `bytes`
    the bytes by component."""

    def __init__(self, name, rows=None):
        from vlmkit.course.suited import in_its_words, questions
        from vlmkit.loading import load

        super().__init__()
        self.name = name
        self.model, self.processor = load(name, "bf16")
        if rows is None:
            rows = questions(name, 6, seed=41, least=6)
            with contextlib.suppress(VlmkitError):  # no answer ends: all of them are wrong
                rows = in_its_words(self.model, self.processor, rows)
        self.rows = list(rows)
        self._unrounded = predict(name, "bf16").by_component
        steps = [(f"{number} bits", number) for number in BITS]
        self.bits = {
            component: self._control(
                "SelectionSlider", 16, options=steps, description=component, **SLOW
            )
            for component, part in anatomy(name).parts.items()
            if part.parameters and self._has_layers(component)
        }
        self._known = {}
        self._show([[*self.bits.values()]])

    def __repr__(self):
        return f"BitsExplorer({self.name!r})"

    def _has_layers(self, component):
        from vlmkit.sensitivity.scopes import select

        with contextlib.suppress(SensitivityError):
            return bool(select(self.model, component).weights)

    def asked(self, bits):
        """([(answer, whether it is right)], bytes by component) under bits, a dict by component."""
        from vlmkit.evaluation import evaluate
        from vlmkit.sensitivity import quantized

        bits = {component: number for component, number in bits.items() if number < 16}
        key = tuple(bits.items())
        if key not in self._known:
            with contextlib.ExitStack() as rounding:
                sizes = dict(self._unrounded)
                for component, number in bits.items():
                    rounded = rounding.enter_context(
                        quantized(self.model, component, f"int{number}")
                    )
                    sizes[component] -= rounded.bytes_saved
                scores = evaluate(self.model, self.processor, self.rows)
            answers = scores.answers[["predicted", "correct"]].itertuples(index=False, name=None)
            self._known[key] = list(answers), sizes
        return self._known[key]

    def _draw(self):
        bits = {component: slider.value for component, slider in self.bits.items()}
        answered, self.bytes = self.asked(bits)
        self.answers = [answer for answer, _ in answered]
        rows = [
            [_pictures(row), html.escape(row["question"]), _marked(*answer)]
            for row, answer in zip(self.rows, answered, strict=True)
        ]
        sizes = ", ".join(f"{c} {n / MEGABYTE:.2f}" for c, n in self.bytes.items() if n)
        self._picture.value = (
            f"<p>{_right(answered)} of {len(self.rows)} answers are right. The weights "
            f"take <b>{_megabytes(self.bytes):.2f} MB</b> ({sizes}).</p>"
            + table_of(["", "question", "answer"], rows)
        )

    def still(self):
        """A row for each component and each number of bits, the other components in bf16."""
        settings = [("all in bf16", {})]
        settings += [(f"{c} in {n} bits", {c: n}) for c in self.bits for n in STILL]
        questions = [f"{_pictures(row)}<br>{html.escape(row['question'])}" for row in self.rows]
        rows = []
        for label, setting in settings:
            answered, sizes = self.asked(setting)
            marked = [_marked(*answer) for answer in answered]
            rows.append([label, f"{_megabytes(sizes):.2f}", _right(answered), *marked])
        return table_of(["", "MB", "right", *questions], rows)


def _pictures(row):
    side = 72 if len(row["images"]) == 1 else 48
    return " ".join(thumbnail(image, side) for image in row["images"])


def _right(answered):
    return sum(right for _, right in answered)


def _marked(answer, right):
    shown = html.escape(answer[:60])
    return f"✓ {shown}" if right else f"✗ <b>{shown}</b>"


# --- words ---------------------------------------------------------------------------------------


def words(model, processor, image, question, *, max_new_tokens=64):
    """Where the model looked for each word of its answer: a WordsExplorer. Click on a word.

    Arguments and errors are those of `vk.attention.over_patches`, with one image. A map is the
    average over all heads of all layers and, if the word has several tokens, over its tokens.
    """
    return WordsExplorer(model, processor, image, question, max_new_tokens)


class WordsExplorer(Explorer):
    """`word` is the row of buttons: its value is the number of a word. `words` are the words, and
    `maps` their arrays (rows, columns) of attention, in shares from 0 to 1."""

    def __init__(self, model, processor, image, question, max_new_tokens=64):
        from vlmkit.attention import over_patches
        from vlmkit.images import read

        super().__init__()
        self.question, self.image = question, read(image)
        found = over_patches(model, processor, self.image, question, max_new_tokens=max_new_tokens)
        groups = words_of(found.tokens, processor.tokenizer.all_special_tokens)
        self.words = [word for word, _ in groups]
        self.maps = [sum(found.mean(token=t) for t in ts) / len(ts) for _, ts in groups]
        self._most = max((each.max() for each in self.maps), default=1)
        options = [(word, number) for number, word in enumerate(self.words)]
        self.word = self._control(
            "ToggleButtons", 0 if options else None, options=options, style={"button_width": "auto"}
        )
        self._show([[self.word]])

    def __repr__(self):
        return f"WordsExplorer({self.question!r}, {' '.join(self.words)!r})"

    def _draw(self):
        if not self.words:
            self._picture.value = "<p>The answer is empty.</p>"
            return
        self._picture.value = thumbnail(self.image, 200) + self._map(self.word.value)

    def still(self):
        """The untouched picture, and a map for each word."""
        maps = (
            f'<div style="display: inline-block; text-align: center"><b>{html.escape(word)}</b>'
            f"<br>{self._map(number)}</div>"
            for number, word in enumerate(self.words)
        )
        first = f"{thumbnail(self.image, 160)}<p>{html.escape(self.question)}</p>"
        return first + " ".join(maps)

    def _map(self, number):
        from matplotlib.figure import Figure

        figure = Figure(figsize=(3, 2.3), layout="constrained")
        shares = self.maps[number]
        attention(self.image, shares, most=self._most, ax=figure.subplots())
        row, column = divmod(int(shares.argmax()), shares.shape[1])
        text = f"{self.words[number]}: most attention, {100 * shares.max():.1f}%, is paid to the "
        return png_of(figure, f"{text}patch in row {row + 1}, column {column + 1}", dpi=80)


def words_of(tokens, special=()):
    """[(word, numbers of its tokens)] of an answer's tokens. A token that begins with a space or
    follows one begins a word; special tokens belong to none. If no token has a space, each is a
    word: some tokenizers keep their spaces to themselves."""
    spaced, found = any(token[:1].isspace() for token in tokens), []
    for number, token in enumerate(tokens):
        if token in special or not token.strip():
            continue
        begins = token[0].isspace() or tokens[number - 1][-1:].isspace() or not spaced
        if found and not begins:
            word, numbers = found[-1]
            found[-1] = (word + token, [*numbers, number])
        else:
            found.append((token.strip(), [number]))
    return found
