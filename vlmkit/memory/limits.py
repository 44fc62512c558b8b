"""Limits: the most that a model can do on a card, and what to save where it does not fit.

    vk.memory.largest("Qwen/Qwen2.5-VL-7B-Instruct", "RTX 4090")
    vk.memory.largest(name, "24 GB", plan, tokens=2048, training={"projector": "full"})
    vk.memory.largest("Qwen/Qwen2.5-VL-32B-Instruct", "2 x RTX 4090")

Every number is a total of `vk.memory.predict`. Memory grows along a straight line, or a line that
gets steeper, as a batch or a prompt grows. So a limit is found with a few predictions: a line
through two of them says where to look next.
"""

import re
from dataclasses import asdict, dataclass, field

from vlmkit.adapters import LoRA
from vlmkit.architectures import LANGUAGE
from vlmkit.backend.quiet import quiet, without_garbage_collection
from vlmkit.catalog.gpus import GPUS, RESERVED
from vlmkit.errors import (
    AnatomyError,
    FinetuningError,
    ImageError,
    PlanError,
    SizeError,
    did_you_mean,
    public,
    shown,
)
from vlmkit.families import family_of
from vlmkit.memory.batch import batch_of
from vlmkit.memory.cards import FSDP, LAYERS, cards_of, check_cards
from vlmkit.memory.fitting import room_on
from vlmkit.memory.ledger import ADAPTER, GRADIENT, OPTIMIZER
from vlmkit.memory.predicting import Predictor, check_arguments, folder_of
from vlmkit.memory.training_state import TORCH
from vlmkit.plan import Plan
from vlmkit.rows import LINEAR
from vlmkit.tables import Table
from vlmkit.units import GIGABYTE

LOAD, PROMPT, TRAINING = "load", "prompt", "training step"
STEPS = {
    "batch_size": 1, "images": 1, "num_frames": 4, "image_size": 64, "tokens": 512, "rank": 16
}  # fmt: skip
"""What can grow, and the step of the search. For image_size it is pixels of the longer side.
For tokens it is less where the context is short."""
MOST = {
    "batch_size": 64, "images": 32, "num_frames": 768, "image_size": 2**14, "tokens": 2**20,
    "rank": 1024,
}  # fmt: skip
"""Where the search ends if the model's context does not end it before."""
SMALLER = ("int8", "nf4", "nf4-dq")
"""Formats of the language model that a saving may choose, those with the most bytes first."""
NOISE = 64 * 2**20
"""Bytes that the allocator's segments may add from one step to the next."""


@dataclass(frozen=True)
class Limit:
    """The largest value of one argument while the others stay as they are.

    value: a number, or (width, height).
    by: what ends it. "memory"; "model", which is its context, or for a rank the width of its
        layers; "search" (`MOST`; more may fit); or "picture": the processor makes larger pictures
        smaller, so that every size fits. "unknown": the search met a value that cannot be
        predicted, and this is where it began.
    """

    value: object
    by: str

    def __str__(self):
        if self.by in ("picture", "unknown"):
            return "any" if self.by == "picture" else "?"
        text = " x ".join(f"{n:,}" for n in self.value) if self.is_size else f"{self.value:,}"
        return {"model": f"{text} m", "search": f"{text} or more"}.get(self.by, text)

    @property
    def is_size(self):
        return isinstance(self.value, tuple)


@dataclass(frozen=True)
class Saving:
    """A change that makes a use smaller.

    what: in words. arguments: those of `vk.memory.predict` to change. saved: bytes. fits: whether
        the use fits with it.
    """

    what: str
    arguments: dict
    saved: int
    fits: bool


@dataclass(frozen=True)
class Use:
    """Loading, a prompt or a training step on a card.

    arguments: for `vk.memory.predict`. needed: bytes. limits: {argument: Limit}, empty if the use
    does not fit. savings: Savings that were tried, in the order of what they cost in quality and
    time, up to the first that fits.
    """

    name: str
    arguments: dict = field(repr=False)
    needed: int
    limits: dict
    savings: tuple = ()


@dataclass(frozen=True)
class Largest(Table):
    """What fits on a card, or on several of one kind.

    uses: a Use for each of "load", "prompt" and "training step". A use that does not fit is
        followed by the same use with the first saving that makes it fit.
    room: bytes of the card that can be used, or of each card.
    """

    model: str
    card: str
    room: int
    reserved: str
    uses: tuple

    def __getitem__(self, name):
        return next(use for use in self.uses if use.name == name)

    @property
    def fits(self):
        """Whether every use fits as it was asked for."""
        return all(use.needed <= self.room for use in self.uses)

    def table(self):
        """A pandas DataFrame: a row for each use, with bytes and Limits."""
        import pandas as pd

        axes = [axis for axis in STEPS if axis != "num_frames" or self._has(axis)]
        rows = {
            use.name: {
                "needed": use.needed,
                "left": self.room - use.needed,
                **{axis: use.limits.get(axis) for axis in axes},
            }
            for use in self.uses
        }
        return pd.DataFrame.from_dict(rows, orient="index")

    def _has(self, argument):
        return any(argument in use.arguments for use in self.uses)

    def to_dict(self):
        """All of it as plain lists and dictionaries, for JSON. Sizes are in bytes."""
        return {
            "model": self.model,
            "card": self.card,
            "room": self.room,
            "uses": [
                {
                    "use": use.name,
                    "arguments": _plain(use.arguments),
                    "needed": use.needed,
                    "fits": use.needed <= self.room,
                    "limits": {axis: asdict(limit) for axis, limit in use.limits.items()},
                    "savings": [
                        asdict(saving) | {"arguments": _plain(saving.arguments)}
                        for saving in use.savings
                    ],
                }
                for use in self.uses
            ],
        }

    def _text_table(self):
        table = self.table().astype(object)
        for column in ("needed", "left"):
            table[column] = [f"{size / GIGABYTE:.2f}" for size in table[column]]
        table = table.rename(columns={"needed": "GB needed", "left": "GB left"})
        table = table.rename(index=_short)
        return table.map(lambda cell: "-" if cell is None else str(cell))

    def _headline(self):
        each = " of each card" * (cards_of(self.card)[0] > 1)
        return f"{self.model} on {self.card}: {self.room / GIGABYTE:.2f} GB{each} can be used"

    def _remarks(self):
        several, card = cards_of(self.card)
        has = f" nvidia-smi shows {GPUS[card].mebibytes:,} MiB;" if card in GPUS else ""
        which = "each card" if several > 1 else "the card"
        left = f"{self.reserved} of {which} is left to CUDA and other programs."
        yield f"1 GB = 10^9 bytes.{has} {left}"
        if several > 1:
            yield (
                "GB are those of the fullest card. shard='layers' puts whole layers on each card "
                "(transformers' device_map='auto'). shard='fsdp' cuts each weight (FSDP), and "
                "batch_size is that of one card. Predicted, not measured."
            )
        for use in self.uses:
            if use.arguments and " + " not in use.name:
                yield f"{use.name}: {_in_words(use.arguments)}."
        if any(use.limits for use in self.uses):
            yield "Each limit is the largest value while everything else in its line stays."
        ends = {limit.by for use in self.uses for limit in use.limits.values()}
        if "model" in ends:
            yield "m: the model takes no more, whatever the card."
        if "picture" in ends:
            yield "any: the processor makes larger pictures smaller, and the largest result fits."
        if "unknown" in ends:
            yield "?: larger values cannot be predicted; vk.memory.predict says why."
        for use in self.uses:
            if use.needed > self.room:
                missing = (use.needed - self.room) / GIGABYTE
                yield f"The {use.name} does not fit: {missing:.2f} GB too much."
                for saving in use.savings:
                    yield (
                        f"  {_short(saving.what)}: {saving.saved / GIGABYTE:.2f} GB less, "
                        f"{'and it fits' if saving.fits else 'which is not enough'}."
                    )
                if not use.savings or not use.savings[-1].fits:
                    yield "  Nothing that was tried makes it fit."


def _short(name):
    """The name of a use or a saving, without the list of what is saved together."""
    use, plus, saving = name.rpartition(" + ")
    return "  + " * bool(plus) + ("all of these together" if " and " in saving else saving)


def _plain(arguments):
    return {
        name: value if value is None or isinstance(value, (int, str, list)) else
        list(value) if isinstance(value, tuple) else str(value) if isinstance(value, Plan)
        else repr(value)
        for name, value in arguments.items()
    }  # fmt: skip


def _in_words(arguments):
    said = {name: value for name, value in arguments.items() if value not in (False, TORCH)}
    text = ", ".join(f"{name}={value!r}" for name, value in said.items())
    return re.sub(r"LoRA\((r=\d+)[^)]*\)", r"LoRA(\1, …)", text)


@public
@without_garbage_collection()
@quiet()
def largest(
    x,
    card,
    plan=None,
    *,
    tokens=512,
    images=None,
    image_size=None,
    num_frames=0,
    new_tokens=0,
    batch_size=1,
    rank=16,
    training=None,
    gradient_checkpointing=False,
    optim=TORCH,
    uses=(LOAD, PROMPT, TRAINING),
    reserved=RESERVED,
    allocator="cuda",
    revision=None,
    trust_remote_code=False,
    **limits,
):
    """The Largest use of `x` under `plan` that fits on `card`: batch, number and size of pictures,
    context and LoRA rank, for loading, a prompt and a training step.

    x, plan, revision, trust_remote_code, allocator, limits: as for `vk.memory.predict`.
    card: a name of `vlmkit.catalog.gpus.GPUS`, or a size such as "12 GB"; or several of one kind,
        such as "2 x RTX 4090". With several cards, loading and a prompt are those of transformers'
        `device_map="auto"`, and a training step is that of FSDP, with `batch_size` samples on each
        card. Then every number is that of the fullest card.
    tokens, images, image_size, num_frames, batch_size: where the search begins. Each of them grows
        while the others stay. images is 1 by default, or 0 with num_frames. image_size is one
        (width, height); it keeps its shape. With num_frames the search takes two to five times as
        long.
    rank: of the LoRA on the language model that a training step trains. training: what is trained
        in place of that, as for `vk.memory.predict`; then the search leaves the rank alone.
    new_tokens: generated after a prompt.
    gradient_checkpointing, optim: of the training step.
    uses: which of "load", "prompt" and "training step" to look at. The training step takes longest.
    reserved: a size, taken off the card's memory for CUDA and other programs.

    Where a use does not fit, the result names savings with their bytes: gradient checkpointing,
    double quantization, a smaller batch, fewer frames or pixels, an 8-bit optimizer, fewer bits.

    Raises SizeError for an unknown card and for a use that the model has no room for whatever the
    card, and whatever `vk.memory.predict` raises.
    """
    check_arguments(limits)
    gpus, one = cards_of(card)
    check_cards(gpus, None, None, False)
    room = room_on(one, reserved)
    model = _Model(x, plan, revision, trust_remote_code, allocator, limits, room)
    first = {"batch_size": batch_size, "tokens": tokens}
    images = int(not num_frames) if images is None else images
    if images or num_frames or image_size is not None:
        images = images or int(not num_frames)
        first["image_size"] = model.size_of(images, image_size, num_frames)
        seen = {"images": images, "num_frames": num_frames}
        first |= {name: number for name, number in seen.items() if number}
    what = {LANGUAGE: LoRA(r=rank)} if training is None else training
    step = {"training": what, "gradient_checkpointing": gradient_checkpointing, "optim": optim}
    more = {"new_tokens": new_tokens} if new_tokens else {}
    asked = {LOAD: {}, PROMPT: first | more, TRAINING: first | step}
    if gpus > 1:
        ways = {LOAD: LAYERS, PROMPT: LAYERS, TRAINING: FSDP}
        asked = {use: had | {"gpus": gpus, "shard": ways[use]} for use, had in asked.items()}
    for name in uses:
        if name not in asked:
            hint = did_you_mean(name, asked)
            raise SizeError(f"{shown(name)} is not a use. {hint}The uses are {', '.join(asked)}.")
    found = []
    for name, given in asked.items():
        if name not in uses:
            continue
        found.append(model.use(name, given, training is None))
        if found[-1].savings and found[-1].savings[-1].fits:
            best = found[-1].savings[-1]
            found.append(
                model.use(f"{name} + {best.what}", given | best.arguments, training is None)
            )
    name = x if isinstance(x, str) else shown(x)
    return Largest(name, str(card), room, str(reserved), tuple(found))


class _Model:
    """A model on a card: what a use needs, remembered, and the searches."""

    def __init__(self, x, plan, revision, trust_remote_code, allocator, limits, room):
        self.x, self.plan, self.room, self.limits = x, plan, room, limits
        self.more, self.models, self.known = (revision, trust_remote_code, allocator), {}, {}
        layout = self.under(plan).layout
        self.config = layout.config
        self.widest = max(
            max(row.shape) for row in layout.rows if (row.component, row.kind) == (LANGUAGE, LINEAR)
        )
        self.folder = folder_of(x, revision)
        context = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        # A short context needs short steps.
        self.steps = STEPS | {"tokens": max(16, min(STEPS["tokens"], (context or 2**20) // 64))}

    def need(self, arguments):
        """Bytes of a use."""
        return self.ledger(arguments).total

    def ledger(self, arguments):
        """The Ledger of a use."""
        key = repr(sorted(arguments.items(), key=lambda item: item[0]))
        if key not in self.known:
            given = self.limits | arguments
            model = self.under(given.pop("plan", self.plan))
            self.known[key] = model.ledger(**given)
        return self.known[key]

    def under(self, plan):
        """The Predictor under a plan."""
        if str(plan) not in self.models:
            revision, trust_remote_code, allocator = self.more
            self.models[str(plan)] = Predictor(self.x, plan, revision, trust_remote_code, allocator)
        return self.models[str(plan)]

    def batch(self, arguments):
        """The Batch of a use. Raises SizeError or ImageError if the model cannot take it."""
        names = ("tokens", "new_tokens", "images", "num_frames", "image_size", "batch_size")
        given = {name: arguments[name] for name in names if name in arguments}
        return batch_of(self.config, self.folder, **given, limits=self.limits)

    def size_of(self, images, image_size, num_frames):
        asked = {"images": images, "image_size": image_size, "num_frames": num_frames}
        sizes = set(batch_of(self.config, self.folder, **asked, limits=self.limits).sizes)
        if len(sizes) > 1:
            raise SizeError(
                f"image_size has {len(sizes)} different sizes. The search needs one (width, "
                "height), which it makes larger."
            )
        return sizes.pop()

    # --- limits ----------------------------------------------------------------------------------

    def use(self, name, arguments, with_rank):
        needed = self.need(arguments)
        if needed > self.room:
            return Use(name, arguments, needed, {}, tuple(self.savings(arguments, needed)))
        axes = [axis for axis in STEPS if axis in arguments]
        axes += ["rank"] if with_rank and "training" in arguments else []
        return Use(name, arguments, needed, {axis: self.limit(axis, arguments) for axis in axes})

    def limit(self, axis, arguments):
        def grown(k):
            return _grown(axis, arguments, k * self.steps[axis])

        high, by = self.ceiling(axis, arguments)
        length = high  # where a larger picture gives no more tokens
        if axis == "image_size":
            last = self.batch(grown(high)).pictures
            length = _first(lambda k: self.batch(grown(k)).pictures == last, high)
        try:
            best = _search(
                lambda k: self.need(grown(k)), lambda k: _extent(axis, grown(k)), self.room, length,
                self.slope(axis, arguments),
            )  # fmt: skip
        except AnatomyError:  # `predict` knows this use, and not a larger one
            return Limit(_value(axis, arguments), "unknown")
        value = _value(axis, grown(best))
        if best < length:
            return Limit(value, "memory")
        shrunk = axis == "image_size" and (length < high or not high)
        return Limit(value, "picture" if shrunk else by)

    def slope(self, axis, arguments):
        """Bytes that one more of `axis` may take: as if all that the use needs beside the weights
        grew with it. With a rank, only what is trained grows."""
        if axis == "rank":
            trained = self.ledger(arguments).by_kind
            size = sum(trained.get(kind, 0) for kind in (ADAPTER, GRADIENT, OPTIMIZER))
        else:
            weights = {n: arguments[n] for n in ("plan", "gpus", "shard") if n in arguments}
            size = self.need(arguments) - self.need(weights)
        start = self.batch(arguments).length if axis == "tokens" else _extent(axis, arguments)
        return size / start

    def ceiling(self, axis, arguments):
        """(the most steps that the model and the search allow, what ends them)."""
        start = _value(axis, arguments)
        start = max(start) if axis == "image_size" else start
        most = max(0, (self.most(axis) - start) // self.steps[axis])

        def refused(k):
            try:
                self.batch(_grown(axis, arguments, k * self.steps[axis]))
            except (SizeError, ImageError):
                return True
            return False

        if axis == "rank" or not refused(most):
            return most, "search" if self.most(axis) == MOST[axis] else "model"
        return _first(refused, most) - 1, "model"

    def most(self, axis):
        """Where the search ends. A rank cannot be more than the widest layer."""
        if axis != "rank":
            return MOST[axis]
        return min(MOST[axis], self.widest)

    # --- savings ---------------------------------------------------------------------------------

    def savings(self, arguments, needed):
        """Savings, up to the first that fits; if none does, what they save together."""
        together, words = {}, []
        for what, change in self.changes(arguments):
            saving = self.saving(what, change, arguments, needed)
            if saving is None:
                continue
            yield saving
            if saving.fits:
                return
            together, words = together | change, [*words, what]
            if len(words) > 1:
                both = self.saving(" and ".join(words), together, arguments, needed)
                if both is not None and both.fits:
                    yield both
                    return

    def saving(self, what, change, arguments, needed):
        try:
            saved = needed - self.need(arguments | change)
        except (SizeError, ImageError, FinetuningError, PlanError):  # such as int8 under FSDP
            return None
        return Saving(what, change, saved, needed - saved <= self.room) if saved > 0 else None

    def changes(self, arguments):
        """(words, arguments) of every saving, the cheapest in quality and time first."""
        plan = Plan.parse(self.plan)
        own = plan[LANGUAGE]
        if "training" in arguments and not arguments["gradient_checkpointing"]:
            yield "gradient checkpointing", {"gradient_checkpointing": True}
        if own == "nf4":
            yield "double quantization", {"plan": plan.with_format(LANGUAGE, "nf4-dq")}
        if arguments.get("batch_size", 1) > 1:
            yield "a batch of 1", {"batch_size": 1}
        family, frames = family_of(self.config), arguments.get("num_frames", 0)
        if frames > 2:
            yield f"half the frames (num_frames={frames // 2})", {"num_frames": frames // 2}
        if "image_size" in arguments and not family.one_size:
            width, height = (max(1, side // 2) for side in arguments["image_size"])
            few = {"image_size": (width, height)}
            if "max_pixels" in family.limits and not self.limits and not frames:
                few = {"max_pixels": width * height}
            yield f"a quarter of the pixels ({_in_words(few)})", few
        if "training" in arguments and not arguments["optim"].startswith("paged"):
            yield "a paged 8-bit optimizer", {"optim": "paged_adamw_8bit"}
        formats = SMALLER[SMALLER.index(own) + 1 :] if own in SMALLER else SMALLER
        formats = () if own == "nf4" else formats  # nf4-dq is the double quantization above
        for name in formats:
            yield f"the language model in {name}", {"plan": plan.with_format(LANGUAGE, name)}
        yield "every component in nf4-dq", {"plan": Plan.uniform("nf4-dq")}


def _value(axis, arguments):
    return arguments["training"][LANGUAGE].r if axis == "rank" else arguments[axis]


def _grown(axis, arguments, more):
    """The arguments of a use with one of them larger by `more`."""
    value = _value(axis, arguments)
    if axis == "rank":
        return arguments | {"training": {LANGUAGE: LoRA(r=value + more)}}
    if axis == "image_size":
        scale = 1 + more / max(value)
        return arguments | {axis: tuple(round(side * scale) for side in value)}
    return arguments | {axis: value + more}


def _first(holds, high):
    """The smallest k from 0 to `high` for which `holds`, which holds for `high`, by bisection."""
    low = -1
    while high - low > 1:
        middle = (low + high) // 2
        if holds(middle):
            high = middle
        else:
            low = middle
    return high


def _extent(axis, arguments):
    """What memory grows with, about in proportion: a number, or the pixels of a picture."""
    value = _value(axis, arguments)
    return value[0] * value[1] if axis == "image_size" else value


def _search(need, extent, room, high, slope):
    """The largest k from 0 to `high` with need(k) <= room. need(0) fits. slope: what one more may
    add to `need`, for the k to begin at.

    Over extent(k), `need` grows, and its growth does not shrink. So a line through two values that
    fit ends at or beyond the limit, and a line between one that fits and one that does not ends at
    or before it.
    """
    start = size = need(0)
    best, top, failed = 0, high + 1, 0

    def reached(slope):
        """The last k that the line from `best` has below `room`."""
        end = extent(best) + (room - size) / slope
        return _first(lambda k: k == high or extent(k + 1) > end, high)

    k = reached(slope) if slope > 0 else high
    k, slope = k - (k < high), None  # one less: it is better to stop short of the limit than beyond
    while best + 1 < top:
        if slope and size + slope * (extent(best + 1) - extent(best)) > room + NOISE:
            break
        k = min(max(k, best + 1), top - 1)
        found = need(k)
        line = (found - size) / (extent(k) - extent(best))
        if found > room:
            # Less than the line says from the second time on: the allocator adds noise.
            top, k = k, reached(line) + 1 - 2**failed
            failed += 1
        else:
            best, size, failed = k, found, 0
            # A short line can be too flat, where the allocator had room left. The long one is not.
            slope = max(line, (found - start) / (extent(k) - extent(0)))
            k = reached(slope) if slope > 0 else high
    return best
