"""Serving: what vLLM would keep for a model, its pictures and its cache, by its published rules.

    vk.memory.serving("Qwen/Qwen2.5-VL-7B-Instruct", "L40S", max_model_len=8192)

The rules were read in vLLM's source of 2026 and not measured (`vllm/config/cache.py`,
`vllm/v1/worker/gpu_worker.py`, `vllm/v1/core/kv_cache_utils.py`, `vllm/v1/kv_cache_interface.py`,
`vllm/v1/core/encoder_cache_manager.py`):

- vLLM takes `gpu_memory_utilization` of the card. A test run shows what weights and activations
  need: `max_num_batched_tokens` tokens, and the largest picture. The rest is the cache.
- The outputs of the vision encoder have a cache of their own: as many as `max_num_batched_tokens`,
  or as the largest picture has tokens if these are more.
- The cache is cut into blocks of 16 tokens. Layers of one kind share a block table. If a model has
  several kinds of layers, they form groups of as many layers as the rarest kind has (as the most
  frequent kind has, if that is less than half as many again), and all groups take their blocks from
  one pool. Kinds with smaller pages get more tokens in a block, so that all pages are equal.
- A request of `max_model_len` tokens takes all its blocks in layers of full attention. With a
  window, or chunks, it takes those of the window and of the tokens that come in one step.

Not counted: CUDA graphs and what CUDA and other libraries keep, for which `reserved` stands; the
logits of the sampler; blocks that requests share by prefix caching; LoRA adapters; more than one
GPU. Activations are those of transformers' kernels, which vLLM's differ from.
"""

from collections import Counter
from dataclasses import asdict, dataclass
from math import ceil

from vlmkit.architectures import LANGUAGE
from vlmkit.backend.quiet import quiet
from vlmkit.catalog.gpus import RESERVED
from vlmkit.errors import AnatomyError, SizeError, public, shown
from vlmkit.memory.batch import Batch
from vlmkit.memory.fitting import memory_of
from vlmkit.memory.ledger import ACTIVATION
from vlmkit.memory.predicting import Predictor, check_arguments
from vlmkit.tables import Table
from vlmkit.units import GIGABYTE, parse_size

BLOCK = 16
"""Tokens of a block of the cache."""
UTILIZATION = 0.92
"""Share of a card that vLLM takes by default. It was 0.9 in earlier versions."""
BATCHED = {160 * 2**30: 16384, 70 * 2**30: 8192, 0: 2048}
"""Least bytes of a card -> tokens of a step of vLLM's server by default, largest first
(`get_batch_defaults` in `vllm/engine/arg_utils.py`; the first line since 0.28). An A100 of any size
has the last."""
HALF = 2
"""Bytes of a number that the vision encoder puts out."""
BESIDE = "sliding window tensor", "cumulative length"
"""What transformers' caches hold beside keys and values, and vLLM's do not."""
FULL, SLIDING, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"


@dataclass(frozen=True)
class Serving(Table):
    """What vLLM would do with a card. All sizes are in bytes.

    requested: of the card. weights, activations, encoder_cache, reserved: what comes off.
    block: bytes of a block in all layers of a group. blocks_per_request: of a request of
    `max_model_len` tokens.
    """

    model: str
    card: str
    requested: int
    weights: int
    activations: int
    encoder_cache: int
    reserved: int
    block: int
    blocks_per_request: int
    max_model_len: int
    max_num_batched_tokens: int

    @property
    def cache(self):
        """Bytes that are left for the cache of keys and values."""
        taken = self.weights + self.activations + self.encoder_cache + self.reserved
        return max(0, self.requested - taken)

    @property
    def blocks(self):
        """Number of blocks in the cache."""
        return self.cache // self.block

    @property
    def requests(self):
        """How many requests of `max_model_len` tokens have room at once: vLLM's "maximum
        concurrency". Below 1, vLLM does not start."""
        return self.blocks / self.blocks_per_request

    def table(self):
        """A pandas DataFrame with a row for each use of the card."""
        import pandas as pd

        rows = {
            "weights": self.weights,
            "activations of a test run": self.activations,
            "outputs of the vision encoder": self.encoder_cache,
            "CUDA, graphs, libraries (assumed)": self.reserved,
            "cache of keys and values": self.cache,
        }
        return pd.DataFrame({"bytes": rows})

    def to_dict(self):
        """All of it as a dictionary, for JSON."""
        own = {"cache": self.cache, "blocks": self.blocks, "requests": self.requests}
        return asdict(self) | own

    def _text_table(self):
        table = (self.table() / GIGABYTE).map("{:.2f}".format)
        return table.rename(columns={"bytes": "GB"})

    def _headline(self):
        return f"{self.model} in vLLM on {self.card}: {self.requested / GIGABYTE:.2f} GB are taken"

    def _remarks(self):
        yield "1 GB = 10^9 bytes. By vLLM's published rules, read and not measured."
        yield (
            f"{self.blocks:,} blocks of the cache, {self.blocks_per_request:,} for a request of "
            f"{self.max_model_len:,} tokens: room for {self.requests:.2f} such requests at once."
        )
        if self.requests < 1:
            yield (
                "vLLM does not start then. Give a smaller max_model_len, another plan, or a "
                "larger gpu_memory_utilization."
            )


@public
@quiet()
def serving(
    x,
    card,
    plan="bf16",
    *,
    gpu_memory_utilization=UTILIZATION,
    max_model_len=None,
    max_num_batched_tokens=None,
    images=1,
    image_size=None,
    reserved=RESERVED,
    revision=None,
    trust_remote_code=False,
    **limits,
):
    """The Serving of `x` by vLLM on one card: what is left for the cache, and how many requests
    have room in it at once. By vLLM's published rules, read and not measured.

    x, plan, revision, trust_remote_code, limits: as for `vk.memory.predict`. card, reserved: as for
        `vk.memory.largest`.
    gpu_memory_utilization: the share of the card that vLLM takes.
    max_model_len: tokens of the longest request, pictures included. By default the model's
        context.
    max_num_batched_tokens: tokens of one step. By default vLLM's: see BATCHED.
    images, image_size: the largest prompt's pictures, and the largest picture's (width, height).

    Raises SizeError for numbers that cannot be, AnatomyError for layers whose cache has no rule
    here, and whatever `vk.memory.predict` raises.
    """
    check_arguments(limits)
    total = memory_of(card)
    if not 0 < gpu_memory_utilization <= 1:
        raise SizeError(
            f"gpu_memory_utilization is above 0 and at most 1, not {shown(gpu_memory_utilization)}"
        )
    known = 0 if "a100" in str(card).lower() else total
    batched = max_num_batched_tokens or next(n for least, n in BATCHED.items() if known >= least)
    model = Predictor(x, plan, revision, trust_remote_code, None)
    text = model.config.get_text_config()
    context = getattr(text, "max_position_embeddings", None)
    length = context if max_model_len is None else max_model_len
    for name, number in {"max_model_len": length, "max_num_batched_tokens": batched}.items():
        if not isinstance(number, int) or isinstance(number, bool) or number < 1:
            raise SizeError(f"{name} is a whole number from 1 on, not {shown(number)}")
    if context and length > context:
        raise SizeError(f"max_model_len {length:,} is more than the model's context of {context:,}")
    block, blocks = _blocks(_layers(model), length, batched)
    seen = model.batch(1, 0, images, image_size, 1, limits)
    pictures = sum(picture.tokens for picture in seen.pictures)
    step = max(1, min(batched, length) - pictures)
    step = min(step, context - pictures) if context else step
    test = model.ledger(tokens=step, images=images, image_size=image_size, **limits)
    largest = max((picture.tokens for picture in seen.pictures), default=0)
    return Serving(
        model=x if isinstance(x, str) else shown(x),
        card=str(card),
        requested=ceil(total * gpu_memory_utilization),
        weights=model.ledger().total,
        activations=test.by_kind.get(ACTIVATION, 0),
        encoder_cache=max(batched, largest) * text.hidden_size * HALF if largest else 0,
        reserved=parse_size(reserved),
        block=block,
        blocks_per_request=blocks,
        max_model_len=length,
        max_num_batched_tokens=batched,
    )


def _layers(model):
    """Counter of (kind, window or None, bytes of a token) of the layers that keep a cache."""
    tokens = BLOCK
    kept = {}
    for entry in model.runs.passes(Batch(model.config, tokens=tokens)).cache:
        what, _, layer = entry.name.partition(" of layer ")
        if what in BESIDE:
            continue
        if entry.component != LANGUAGE or what not in ("keys", "values") or not layer:
            raise AnatomyError(
                f"{model.config.model_type} keeps {entry.name} in its cache, for which vlmkit has "
                "no rule of vLLM's: layers of attention with full, sliding or chunked windows have "
                "one."
            )
        kept[int(layer)] = kept.get(int(layer), 0) + entry.bytes // tokens
    text = model.config.get_text_config()
    window = getattr(text, "sliding_window", None)
    windows = {FULL: None, SLIDING: window}
    windows[CHUNKED] = getattr(text, "attention_chunk_size", None)
    usual = SLIDING if window and getattr(text, "use_sliding_window", True) else FULL
    kinds = getattr(text, "layer_types", None) or [usual] * (max(kept) + 1)
    return Counter((kinds[place], windows[kinds[place]], size) for place, size in kept.items())


def _blocks(layers, length, batched):
    """(bytes of a block in all layers of a group, blocks of a request of `length` tokens).

    layers: {(kind, window, bytes of a token): how many}. batched: tokens of one step.
    """
    fewest, most = min(layers.values()), max(layers.values())
    group = most if most < 1.5 * fewest else fewest
    page = BLOCK * max(size for _, _, size in layers)
    blocks = 0
    for (kind, window, size), count in layers.items():
        if page % (BLOCK * size):
            raise AnatomyError(
                f"the pages of its layers, {page:,} and {BLOCK * size:,} bytes, are no multiples "
                "of each other: vlmkit has no rule of vLLM's for that."
            )
        tokens = page // size
        needed = ceil(length / tokens)
        if kind == SLIDING:  # a window may begin within a block
            needed = ceil(min(window - 1 + batched, length) / tokens) + 1
        elif kind == CHUNKED:
            needed = ceil(min(window + batched, length) / tokens)
        blocks += needed * ceil(count / group)
    return page * group, blocks
