"""Predictions held against a GPU: published models at full size, with random weights.

    make benchmark-gpu                                          # some minutes, 25 GB of disk
    python benchmarks/gpu.py --models SmolVLM --output smol.json
    python benchmarks/gpu.py --only trainings
    python benchmarks/gpu.py --scratch /mnt/fast                # where checkpoints are made

Bytes and speed do not depend on what the weights are, so each model is made from its config in the
catalog, saved, and loaded as from a download. What is measured, and what is predicted of it:

loads       bytes that PyTorch's allocator counts after a load, the peak during it, and seconds
            beside those of `from_pretrained` with the same quantization config (the files are in
            the page cache; the two take turns, the first load of a model is not counted)
passes      what a prompt, and one token after it, hold at most beside weights and inputs; the
            cache of keys and values
steps       what a training step with LoRA on the language model holds at most: without gradient
            checkpointing, with it, and with it and the hook on the embeddings that transformers and
            peft add; and how far the gradients are from those without
trainings   steps a second and peak of `vk.finetuning.train`, and of peft and Trainer as people set
            them up; for ours, the predicted peak
quantizer   NF4 made on the GPU and on the CPU: whether the bytes are the same, and how far the
            products are from each other and from the exact ones

The results are written as JSON after each of them, so that a run cut short leaves what it has.
"""

import argparse
import gc
import json
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import gpu_setups as setups
import torch

import vlmkit as vk
from vlmkit.anatomy import on_meta
from vlmkit.backend.caching import cache_of, with_cache
from vlmkit.backend.quiet import quiet
from vlmkit.formats import torch_dtype
from vlmkit.layout import layout_of
from vlmkit.memory.batch import batch_of
from vlmkit.memory.measuring import measure_peak
from vlmkit.memory.steps import DryRuns

RESULTS = Path(__file__).resolve().parent / "results"
MODELS = (
    "HuggingFaceTB/SmolVLM-256M-Instruct",
    "llava-hf/llava-1.5-7b-hf",
    "Qwen/Qwen2.5-VL-7B-Instruct",
    "meta-llama/Llama-3.2-11B-Vision-Instruct",
    "llava-hf/llava-v1.6-mistral-7b-hf",
    "google/gemma-3-4b-it",
    "Qwen/Qwen3.5-9B",
)
TRAINED = MODELS[2:4]
PARTS = ("loads", "trainings")
STEPS = 64  # of a training, the first two of which are not timed
FORMATS = ("bf16", "nf4", "nf4-dq", "int8")
"""Of the language model; everything else stays in bf16, as in the recommended plan."""
TOKENS = 128  # of text in every prompt
PICTURES = (1, 8)
LORA = {"language_model": vk.LoRA(r=16)}


@dataclass
class Results:
    """What was measured so far, kept in a file."""

    path: Path
    found: dict = field(default_factory=dict)

    def add(self, kind, **row):
        self.found.setdefault(kind, []).append(row)
        self.write()
        print(kind, json.dumps(row), file=sys.stderr, flush=True)

    def write(self):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.found, indent=1) + "\n", encoding="utf-8")
        partial.replace(self.path)

    @contextmanager
    def attempt(self, what):
        """A failure is a result: it is kept, with what it was of, and the rest goes on."""
        try:
            yield
        except Exception as error:
            self.add("failures", what=what, error=f"{type(error).__name__}: {error}"[:1000])


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="*", help="parts of names; by default all")
    parser.add_argument("--only", choices=PARTS, help="loads and passes, or trainings")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to try the script")
    parser.add_argument("--output", type=Path, help="by default a new file in benchmarks/results")
    parser.add_argument("--scratch", type=Path, help="a folder with room for a checkpoint")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA GPU here: --device cpu tries the script without one")
    chosen = [n for n in MODELS if not args.models or any(part in n for part in args.models)]
    if not chosen:
        parser.error(f"no model has any of {args.models} in its name: they are {', '.join(MODELS)}")
    configs = {name: setups.published(name) for name in chosen}
    parts = [args.only] if args.only else PARTS
    results = run(configs, args.device, args.output, args.scratch, parts=parts)
    print(report(results.found))
    return int("failures" in results.found)


def run(configs, device, output=None, scratch=None, trained=TRAINED, pictures=PICTURES,
        steps=STEPS, parts=PARTS):  # fmt: skip
    """Measure the models of `configs` ({name: config}) on `device`. Returns the Results."""
    machine = setups.machine(device)
    name = machine["device"].lower().replace(" ", "-")
    results = Results(output or RESULTS / f"{name}-{machine['date']}.json", {"machine": machine})
    with quiet(), results.attempt("quantizer"):
        for row in quantizer(device) if "loads" in parts else ():
            results.add("quantizer", **row)
    if "trainings" not in parts:
        trained = ()
    if "loads" not in parts:
        configs = {name: config for name, config in configs.items() if name in trained}
    for name, config in configs.items():
        with (
            tempfile.TemporaryDirectory(dir=scratch) as folder,
            quiet(),
            results.attempt(f"{name}: making it"),
        ):
            setups.make(config, folder, device)
            for label in FORMATS if "loads" in parts else ():
                with results.attempt(f"{name} in {label}"):
                    model_under(name, folder, label, device, results, pictures)
                _free()
            for checkpointing in (False, True) if name in trained else ():
                what = f"training {name}, {'' if checkpointing else 'no '}checkpointing"
                with results.attempt(what):
                    train(name, folder, checkpointing, device, results, steps)
                _free()
    return results


# --- loads ----------------------------------------------------------------------------------------


def model_under(name, folder, label, device, results, pictures):
    """Load the model in `folder` with its language model in `label`; measure load and passes."""
    plan = vk.Plan(language_model=label)
    layout = layout_of(folder, plan)
    if label == FORMATS[0]:  # what only the first load of a model pays for is nobody's
        setups.plain(folder, layout, device)
        _free()
    plain, plain_seconds = _timed(lambda: setups.plain(folder, layout, device), device)
    del plain
    _free()
    before = _counted(device)
    _restart(device)
    (model, _), seconds = _timed(
        lambda: vk.load(folder, plan, processor=False, device=device), device
    )
    peak = _peak(device)
    _free()
    allocated, reserved = (
        now and now - then for now, then in zip(_counted(device), before, strict=True)
    )
    predicted = vk.memory.predict(folder, plan)
    with_allocator = vk.memory.predict(folder, plan, allocator="cuda")
    unused = with_allocator.by_kind["allocator unused"]
    measured = vk.memory.measure(model)
    results.add(
        "loads",
        model=name,
        plan=label,
        seconds=round(seconds, 3),
        plain_seconds=round(plain_seconds, 3),
        predicted=predicted.total,
        measured=measured.total,
        by_component=measured.by_component,
        predicted_allocated=with_allocator.total - unused,
        allocated=allocated,
        predicted_reserved=with_allocator.total,
        reserved=reserved,
        peak=peak and peak - before[0],
        audit=str(vk.audit(model, plan)),
    )
    for count in pictures:
        with results.attempt(f"{name} in {label}: {count} pictures"):
            results.add(
                "passes", model=name, plan=label, **passes(model, folder, plan, count, device)
            )


def passes(model, folder, plan, count, device):
    """What a prompt of `count` pictures holds at most, and one token after it."""
    layout = layout_of(folder, plan)
    config = layout.config
    sizes = {"tokens": TOKENS, "images": count, "batch": 1}
    try:
        batch_of(config, folder, **_asked(sizes))
    except vk.errors.SizeError:  # so many pictures have no room in one prompt of this model
        sizes |= {"images": 1, "batch": count}
    batch = batch_of(config, folder, **_asked(sizes), new_tokens=1)
    runs = DryRuns(
        lambda: on_meta(config, torch_dtype(layout.load_dtype)),
        layout,
        None if device == "cpu" else "cuda",
    )
    predicted = runs.passes(batch)
    inputs = setups.inputs(model, batch)
    last = {"logits_to_keep": 1} if model._supports_logits_to_keep() else {}
    kept = {}

    @torch.no_grad()
    def prompt():
        kept.clear()
        kept["cache"] = cache_of(model(**inputs, use_cache=True, **last))

    prompt()  # cuBLAS takes its workspace in the first
    kept.clear()
    prefill = measure_peak(prompt)
    after_prompt = _cache_bytes(model, kept["cache"])
    one = setups.one_token(model, batch)

    @torch.no_grad()
    def token():
        model(**one, **with_cache(kept["cache"]), use_cache=True)

    decode = measure_peak(token) + after_prompt
    growing = [e for e in predicted.cache if e.component != "cross_attention"]
    return {
        **sizes,
        "positions": batch.length,
        "predicted_prefill": sum(predicted.prefill.values()),
        "prefill": prefill,
        "predicted_decode": sum(predicted.decode.values()),
        "decode": decode,
        "predicted_cache": sum(e.bytes for e in predicted.cache),
        "cache": _cache_bytes(model, kept["cache"]),
        "cache_per_token": sum(e.bytes for e in growing) // (batch.length + 1),
    }


def _asked(sizes):
    """Sizes as `vk.memory.predict` takes them. Recorded rows have the key "batch"."""
    return {"batch_size" if key == "batch" else key: size for key, size in sizes.items()}


def _cache_bytes(model, cache):
    return vk.memory.measure(model, cache=cache).by_kind["kv cache"]


# --- training -------------------------------------------------------------------------------------


def train(name, folder, checkpointing, device, results, steps):
    """A QLoRA step with a picture; then trainings of `steps` steps, ours and the usual one."""
    plan = vk.Plan.recommended()
    sizes = {"tokens": TOKENS, "images": 1, "batch": 1}
    training = {"training": LORA, "gradient_checkpointing": checkpointing, "allocator": "cuda"}
    predicted = vk.memory.predict(folder, plan, **_asked(sizes), **training)
    model, _ = vk.load(folder, plan, processor=False, device=device)
    model = vk.finetuning.add_adapters(model, **LORA)
    batch = batch_of(model.config, folder, **_asked(sizes))
    tensors = setups.inputs(model, batch)
    kinds = predicted.by_kind
    hooks = (False, True) if checkpointing else (False,)
    plain, apart = setups.gradients(model, tensors), {}
    for hook in hooks:  # before a step changes the weights
        setups.switch(model, checkpointing, hook)
        found = setups.gradients(model, tensors)
        apart[hook] = max(_relative(found[n], g) for n, g in plain.items() if g.any())
    del plain, found
    for hook in hooks:
        setups.switch(model, checkpointing, hook)
        step = setups.step(model, tensors)
        step()  # which makes the optimizer's states, and takes cuBLAS' workspace
        _restart(device)
        own = measure_peak(step)
        row = {"predicted_step": sum(kinds.get(kind, 0) for kind in ("activation", "gradient"))}
        row |= {"predicted_peak": predicted.total - kinds["allocator unused"]}
        results.add(
            "steps",
            model=name,
            checkpointing=checkpointing,
            hook=hook,
            **({} if hook else row),
            step=own,
            peak=_peak(device),
            gradients_apart=apart[hook],
            positions=batch.length,
        )
        del step
    del model, tensors
    _free()
    expected = predicted_training(folder, plan, checkpointing, steps)
    # In turns, and each first once: what else the machine does goes by in minutes.
    for way in (setups.ours, setups.usual, setups.usual, setups.ours):
        with results.attempt(f"{name}: {way.__name__} training, checkpointing {checkpointing}"):
            _restart(device)
            seconds, loss, trained = way(
                folder, plan, LORA["language_model"], checkpointing, device, steps
            )
            results.add(
                "trainings",
                model=name,
                checkpointing=checkpointing,
                way=way.__name__,
                steps_a_second=round(1 / median(seconds), 4),
                seconds=[round(s, 4) for s in seconds],
                loss=round(loss, 4),
                trained=trained,
                **({"predicted_peak": expected} if way is setups.ours else {}),
                peak=_peak(device),
            )
        _free()


def predicted_training(folder, plan, checkpointing, steps):
    """What `setups.ours` holds at most, for the longest of its rows."""
    config = layout_of(folder, plan).config
    rows = setups.rows(config, steps)
    length = setups.plain_collator(setups.processor_of(config))(rows)["input_ids"].shape[1]
    sizes = {"images": 1, "image_size": rows[0]["images"][0].size}
    around = batch_of(config, folder, tokens=1, **sizes).length - 1
    use = {"training": LORA, "gradient_checkpointing": checkpointing, "allocator": "cuda"}
    predicted = vk.memory.predict(folder, plan, tokens=length - around, **sizes, **use)
    return predicted.total - predicted.by_kind["allocator unused"]


# --- the quantizer --------------------------------------------------------------------------------


def quantizer(device, shapes=((4096, 4096), (1024, 14336), (320, 1000))):
    """NF4 of the same weights on the GPU and on the CPU, a row for each shape."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    from vlmkit.backend import quantizing

    for seed, shape in enumerate(shapes):
        generator = torch.Generator().manual_seed(seed)
        weight = (torch.randn(shape, generator=generator) * 0.02).bfloat16()
        x = torch.randn(16, shape[1], generator=generator).bfloat16()
        sides = {}
        for place in ("cpu", device):
            packed, state = quantize_4bit(weight.to(place), blocksize=64, quant_type="nf4")
            rounded = dequantize_4bit(packed, state)
            y = torch.nn.functional.linear(x.to(place), rounded)
            sides[place] = [t.cpu() for t in (packed.flatten(), state.absmax, rounded, y)]
        ours = quantizing.quantize_4bit(weight, "nf4")
        here, there = sides["cpu"], sides[device]
        exact = x.double() @ weight.double().T
        yield {
            "shape": list(shape),
            "codes": here[0].numel() * 2,
            "codes_that_differ": _differing(here[0], there[0]),
            "codes_that_differ_from_vlmkits": _differing(ours[0].flatten(), there[0]),
            "scales_that_differ": int((here[1] != there[1]).sum()),
            "rounded_weights_that_differ": int((here[2] != there[2]).sum()),
            "products_apart": _relative(here[3], there[3].double()),
            "products_from_exact": _relative(there[3], exact),
            "weights_from_exact": _relative(there[2], weight.double()),
        }


def _differing(one, other):
    """How many 4-bit codes differ: two are packed into a byte."""
    change = one ^ other
    return int((change & 15 != 0).sum() + (change >> 4 != 0).sum())


def _relative(found, exact):
    return float((found.double() - exact).norm() / exact.norm())


# --- device and clock -----------------------------------------------------------------------------


def _timed(work, device):
    _wait(device)
    start = time.perf_counter()
    result = work()
    _wait(device)
    return result, time.perf_counter() - start


def _wait(device):
    if device != "cpu":
        torch.cuda.synchronize()


def _free():
    if torch.cuda.is_available():  # a CPU does not care what is left, and looking takes time
        gc.collect()
        torch.cuda.empty_cache()


def _restart(device):
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()


def _counted(device):
    """Bytes in blocks given out, and in segments, by PyTorch's allocator; None on a CPU."""
    if device == "cpu":
        return None, None
    return torch.cuda.memory_allocated(), torch.cuda.memory_reserved()


def _peak(device):
    return None if device == "cpu" else torch.cuda.max_memory_allocated()


# --- tables ---------------------------------------------------------------------------------------

PAIRS = {
    "loads": {
        "bytes": ("predicted", "measured"),
        "allocated": ("predicted_allocated", "allocated"),
        "reserved": ("predicted_reserved", "reserved"),
    },
    "passes": {
        "prefill": ("predicted_prefill", "prefill"),
        "decode": ("predicted_decode", "decode"),
        "cache": ("predicted_cache", "cache"),
    },
    "steps": {"step": ("predicted_step", "step"), "peak": ("predicted_peak", "peak")},
    "trainings": {"peak": ("predicted_peak", "peak")},
}
"""Kind of result -> what is compared: (predicted, measured)."""


def report(found):
    """The results as Markdown: predicted, measured, and how far the prediction is off."""
    lines = [", ".join(f"{key} {value}" for key, value in found["machine"].items())]
    for kind, pairs in PAIRS.items():
        if not found.get(kind):
            continue
        lines += [
            "",
            f"| {kind} | what | predicted, MB | measured, MB | off |",
            "|---|---|--:|--:|--:|",
        ]
        for row in found[kind]:
            label = ", ".join(
                str(row[key]) for key in ("model", "plan", "images", "batch", "checkpointing")
                if key in row
            )  # fmt: skip
            for what, (a, b) in pairs.items():
                if a in row and row[b] is not None:
                    off = f"{row[a] / row[b] - 1:+.3%}"
                    lines.append(
                        f"| {label} | {what} | {row[a] / 1e6:,.1f} | {row[b] / 1e6:,.1f} | {off} |"
                    )
    if found.get("loads"):
        lines += ["", "| load | vlmkit, s | plain call, s | peak, MB |", "|---|--:|--:|--:|"]
        for row in found["loads"]:
            peak = "" if row["peak"] is None else f"{row['peak'] / 1e6:,.1f}"
            lines.append(
                f"| {row['model']}, {row['plan']} | {row['seconds']:.2f} "
                f"| {row['plain_seconds']:.2f} | {peak} |"
            )
    for kind in ("trainings", "quantizer", "failures"):
        lines += ["", *(json.dumps(row) for row in found.get(kind, ()))]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
