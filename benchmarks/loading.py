"""How long loading takes, and how much memory: vlmkit against transformers' own call.

    python benchmarks/loading.py                            # about ten minutes, 4 GB of disk
    python benchmarks/loading.py --repeats 1                # quicker
    python benchmarks/loading.py --model FOLDER             # another checkpoint
    python benchmarks/loading.py --markdown table.md        # write the tables there too

The checkpoint is a LLaVA of 970 M parameters with random bf16 weights, which this script makes. The
"plain call" is `from_pretrained(quantization_config=BitsAndBytesConfig(...))` with the config that
vlmkit makes from the plan. Each measurement is a process of its own, which imports the packages,
loads the model, and loads it again. The variants take turns. Tables show the median, the least and
the most. Memory is the peak in the first load, beyond the imports, of what no file backs (RssAnon,
on Linux only).
"""

import argparse
import gc
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median

PLAN = "recommended"
READ, PLAIN, VLMKIT = "reading the files", "plain call", "vlmkit"
LOADS = tuple((plan, load) for plan in ("bf16", PLAN) for load in (PLAIN, VLMKIT))
BESIDE = {
    "seconds": "the first of a process",
    "again": "the next",
    "anew": "the next, its plan resolved anew",
    "touched": "the next, with every page of the weights read",
}
SIDE = 4096  # of the square weight for the quantizer alone
MEGABYTE, GIGABYTE = 10**6, 10**9


def main(argv=None):
    parser = argparse.ArgumentParser(description="Measure loading against transformers' own call.")
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="a checkpoint in bf16")
    parser.add_argument("--repeats", type=int, default=5, help="of every measurement (5)")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables there too")
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # for a process of its own
    parser.add_argument("--config", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.measure:
        print(json.dumps(MEASURES[args.measure](args.model, args.config)))
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.model or Path(scratch, "model")
        if not args.model:
            print("making the checkpoint", file=sys.stderr)
            _measured("make", folder)
        text = _report(folder, args.repeats)
    print(text)
    if args.markdown:
        args.markdown.write_text(text + "\n", encoding="utf-8")
    return 0


def _report(folder, repeats):
    config = _measured("config", folder)
    cases = [READ, *("/".join(load) for load in LOADS)]
    found = {case: [] for case in cases}
    rates = []
    for repeat in range(repeats):
        print(f"repeat {repeat + 1} of {repeats}", file=sys.stderr)
        for case in cases:
            found[case].append(_measured(case, folder, config))
        rates.append(_measured("quantizers", folder))
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    read = median(run["seconds"] for run in found[READ])
    lines = [
        _machine(),
        "",
        f"A checkpoint of {size / GIGABYTE:.2f} GB, in memory already. Reading its files takes "
        f"{_spread(run['seconds'] for run in found[READ])} s.",
        "",
        "| plan | load | seconds | to the plain call | to reading the files | again | to the plain "
        "call | peak MB | model MB |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for plan, load in LOADS:
        runs, plain = found[f"{plan}/{load}"], found[f"{plan}/{PLAIN}"]
        lines.append(
            f"| {plan} | {load} | {_spread(run['seconds'] for run in runs)} "
            f"| {_ratio(runs, plain, 'seconds')} "
            f"| {median(run['seconds'] for run in runs) / read:.1f} "
            f"| {_spread(run['again'] for run in runs)} | {_ratio(runs, plain, 'again')} "
            f"| {_spread((run['peak'] for run in runs), '.0f')} | {runs[0]['model']:.0f} |"
        )
    lines += ["", "| a load in bf16 | plain call, s | vlmkit, s | to the plain call |"]
    lines.append("|---|---:|---:|---:|")
    plain, ours = found[f"bf16/{PLAIN}"], found[f"bf16/{VLMKIT}"]
    for what, label in BESIDE.items():
        lines.append(
            f"| {label} | {_spread((run[what] for run in plain), '.3f')} "
            f"| {_spread((run[what] for run in ours), '.3f')} | {_ratio(ours, plain, what)} |"
        )
    lines += [
        "",
        f"| quantizer, {SIDE} × {SIDE} bf16 | threads | bitsandbytes, s per GB | vlmkit, s per GB "
        "| times faster |",
        "|---|---:|---:|---:|---:|",
    ]
    for kind, threads in (key.split() for key in rates[0]):
        both = [run[f"{kind} {threads}"] for run in rates]
        theirs, ours = zip(*both, strict=True)
        lines.append(
            f"| {kind} | {threads} | {_spread(theirs)} | {_spread(ours)} "
            f"| {_spread((a / b for a, b in both), '.1f')} |"
        )
    return "\n".join(lines)


def _spread(values, form=".2f"):
    """The median of `values`, and in brackets the least and the most."""
    values = sorted(values)
    return f"{median(values):{form}} [{values[0]:{form}}, {values[-1]:{form}}]"


def _ratio(runs, plain, what):
    ratio = median(run[what] for run in runs) / median(run[what] for run in plain)
    return f"{ratio:.2f} ×" if ratio > 0.5 else f"1/{1 / ratio:.1f}"


def _machine():
    """The machine and the versions, in a sentence."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text(encoding="utf-8").splitlines()
        name = next((line.split(": ")[1] for line in lines if "model name" in line), name)
    packages = ("torch", "transformers", "bitsandbytes")
    return (
        f"{os.cpu_count()} cores of {name}, {platform.system()}, Python "
        f"{platform.python_version()}, {', '.join(f'{p} {version(p)}' for p in packages)}."
    )


# --- in a process of its own ------------------------------------------------------------------


def _measured(what, folder, config=None):
    """What this script prints when it is run with `--measure what`."""
    command = [sys.executable, __file__, "--measure", what, "--model", folder]
    command += ["--config", json.dumps(config)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _make(folder, _):
    import torch
    from transformers import (
        AutoModelForImageTextToText,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
    )

    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            image_size=336,
            patch_size=14,
        ),
        text_config=LlamaConfig(
            hidden_size=2048,
            intermediate_size=5632,
            num_hidden_layers=12,
            num_attention_heads=32,
            num_key_value_heads=4,
            vocab_size=32064,
        ),
    )
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="500MB")


def _read(folder, _):
    room = bytearray(2**24)
    start = time.perf_counter()
    for path in sorted(folder.glob("*.safetensors")):
        with open(path, "rb", buffering=0) as file:
            while file.readinto(room):
                pass
    return {"seconds": time.perf_counter() - start}


def _config(folder, _):
    """The BitsAndBytesConfig of the plan, as a dictionary."""
    from vlmkit.layout import layout_of

    return layout_of(folder, PLAN).quantization_config().to_dict()


def _load(folder, config, plan, load):
    import torch
    from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

    import vlmkit as vk
    from vlmkit import layout
    from vlmkit.backend.quiet import quiet

    kwargs = {}
    if plan == PLAN and load == PLAIN:
        kwargs = {"quantization_config": BitsAndBytesConfig.from_dict(config)}

    def work():
        if load == PLAIN:
            return AutoModelForImageTextToText.from_pretrained(
                folder, dtype=torch.bfloat16, **kwargs
            )
        return vk.load(folder, plan, processor=False, device="cpu")[0]

    with quiet():  # imports bitsandbytes, too
        with _Memory() as memory:
            model, seconds = _timed(work)
        size = vk.memory.measure(model).total / MEGABYTE
        del model
        again = _next(work)
        layout._KEPT.clear()
        anew = _next(work)
        touched = _next(lambda: _touch(work()))
    times = {"seconds": seconds, "again": again, "anew": anew, "touched": touched}
    return times | {"peak": memory.peak, "model": size}


def _next(work):
    gc.collect()
    return _timed(work)[1]


def _touch(model):
    """Read a byte of every page of the weights, so that a mapped file is read completely."""
    import torch

    for parameter in model.parameters():
        parameter.detach().flatten().view(torch.uint8)[::4096].sum()


def _timed(work):
    start = time.perf_counter()
    result = work()
    return result, time.perf_counter() - start


def _quantizers(*_):
    import torch

    from vlmkit.backend.quantizing import quantize_4bit
    from vlmkit.backend.quiet import quiet

    with quiet():
        weight = (torch.randn(SIDE, SIDE) * 0.02).bfloat16()
    rates = {}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for kind in ("nf4", "fp4"):
            theirs = _time(
                lambda kind=kind: torch.ops.bitsandbytes.quantize_4bit(
                    weight, 64, kind, torch.uint8
                )
            )
            ours = _time(lambda kind=kind: quantize_4bit(weight, kind))
            rates[f"{kind} {threads}"] = [s / (weight.nbytes / GIGABYTE) for s in (theirs, ours)]
    return rates


def _time(work, times=3):
    """Seconds that `work` takes: the median of three calls, after one that does not count."""
    work()
    return median(_timed(work)[1] for _ in range(times))


class _Memory:
    """The peak of this process's anonymous memory within a block, in MB beyond what there was."""

    def __enter__(self):
        self.before = self.most = _anonymous()
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def _watch(self):
        while not self.over.wait(0.005):
            self.most = max(self.most, _anonymous())

    def __exit__(self, *_):
        self.over.set()
        self.thread.join()
        self.peak = max(self.most, _anonymous()) - self.before


def _anonymous():
    """MB of this process's memory that no file backs."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("RssAnon:")[1].split()[0]) * 1024 / MEGABYTE


MEASURES = {"make": _make, READ: _read, "config": _config, "quantizers": _quantizers}
for _plan, _how in LOADS:
    MEASURES[f"{_plan}/{_how}"] = partial(_load, plan=_plan, load=_how)


if __name__ == "__main__":
    sys.exit(main())
