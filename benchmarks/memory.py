"""How near predictions of memory come to what is there, and how long they take.

    python benchmarks/memory.py                             # some minutes, 4 GB of disk
    python benchmarks/memory.py --markdown table.md         # write the tables there too

The checkpoints have the widths and vocabularies of published models and some of their layers, in
bf16, with random weights, made for the occasion. Each is loaded under each plan; what it then holds
is counted by storage, its quantization states with it. Beside that:

- vlmkit: `vk.memory.predict`, from the checkpoint's config alone;
- accelerate: the "Total Size" of `accelerate estimate-memory`, for the plan's smallest number
  format, as it has one for all; what it asks of the hub is answered here;
- footprint: `model.get_memory_footprint()` of the model that is loaded already;
- rule: parameters at 4 bytes, and of that an eighth for 4 bits, a quarter for 8 and half for 16.

Lastly a model of 11 billion parameters, of which there are no weights, is predicted in a process of
its own.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from contextlib import redirect_stdout
from pathlib import Path
from statistics import mean, median
from unittest import mock

from loading import _machine, _Memory

CHECKPOINTS = {
    "HuggingFaceTB/SmolVLM-256M-Instruct": (30, 12),
    "llava-hf/llava-1.5-7b-hf": (2, 4),
    "Qwen/Qwen2.5-VL-3B-Instruct": (4, 4),
    "meta-llama/Llama-3.2-11B-Vision-Instruct": (4, 2),
}
"""Models of the catalog, with the layers of language model and vision encoder that are kept."""
PLANS = {"bf16": 16, "int8": 8, "nf4": 4, "nf4-dq": 4, "recommended": 4}
"""Plans, with the bits of their smallest format."""
LARGE = "meta-llama/Llama-3.2-11B-Vision-Instruct"
QUESTIONS = {
    "weights": {},
    "a prompt of 4 pictures and 2,048 tokens": {"tokens": 2048, "images": 4},
    "a LoRA step, one picture and 512 tokens": {"tokens": 512, "images": 1, "training": "lora"},
}
WAYS = ("vlmkit", "accelerate", "footprint", "rule")
MEGABYTE = 10**6


def main(argv=None):
    parser = argparse.ArgumentParser(description="Measure predictions of memory.")
    parser.add_argument("--repeats", type=int, default=3, help="of every timing (3)")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables there too")
    parser.add_argument("--predict", help=argparse.SUPPRESS)  # what a process of its own is to do
    args = parser.parse_args(argv)
    if args.predict:
        print(json.dumps(_predicted(QUESTIONS[args.predict])))
        return 0
    rows = []
    for name, layers in CHECKPOINTS.items():
        print(name, file=sys.stderr)
        with tempfile.TemporaryDirectory() as folder:
            _make(name, layers, folder)
            rows += [_row(name, folder, plan, args.repeats) for plan in PLANS]
    text = "\n".join(
        [_machine(), "", *_errors(rows), "", *_seconds(rows), "", *_large(args.repeats)]
    )
    print(text)
    if args.markdown:
        args.markdown.write_text(text + "\n", encoding="utf-8")
    return 0


# --- predicted and measured -----------------------------------------------------------------------


def _make(name, layers, folder):
    """Save a model like the catalog's `name`, but of fewer layers, in `folder`."""
    import torch
    from transformers import AutoModelForImageTextToText

    from vlmkit.catalog import folder_of
    from vlmkit.checkpoints import read_config

    config = read_config(folder_of(name))
    text, vision = config.text_config, config.vision_config
    text.num_hidden_layers = layers[0]
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[: layers[0]]
    if config.model_type == "mllama":
        text.cross_attention_layers = [1]
        vision.num_global_layers = 1
        vision.intermediate_layers_indices = [0] * len(vision.intermediate_layers_indices)
    depth = "depth" if hasattr(vision, "depth") else "num_hidden_layers"
    setattr(vision, depth, layers[1])
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)


def _row(name, folder, plan, repeats):
    """(model, plan, measured bytes, {way: predicted bytes}, {way: seconds})."""
    import vlmkit as vk
    from vlmkit.backend.quiet import quiet

    with quiet(), redirect_stdout(sys.stderr):  # accelerate says what it does
        model, _ = vk.load(folder, plan, processor=False, device="cpu")
        measured = vk.memory.measure(model).total
        ways = {
            "vlmkit": lambda: vk.memory.predict(folder, plan).total,
            "accelerate": lambda: _accelerate(folder, PLANS[plan]),
            "footprint": model.get_memory_footprint,
            "rule": lambda: vk.anatomy(folder).total * 4 * PLANS[plan] // 32,
        }
        found, seconds = {}, {}
        for way, predict in ways.items():
            runs = [_timed(predict) for _ in range(repeats)]
            found[way], seconds[way] = runs[0][0], median(run[1] for run in runs)
    return name, plan, measured, found, seconds


def _accelerate(folder, bits):
    """Bytes that `accelerate estimate-memory` gives for the model in `folder`."""
    from accelerate.commands import estimate

    dtype = {16: "float16", 8: "int8", 4: "int4"}[bits]
    asked = Namespace(
        model_name=str(folder), library_name="transformers", trust_remote_code=False, dtypes=[dtype]
    )
    # the network call: whether there is such a model on the hub, and code of its own
    answer = mock.Mock(library_name="transformers", config={})
    with mock.patch.object(estimate, "model_info", return_value=answer):
        ((_, _, size, _),) = estimate.gather_data(asked)
    return int(size)


def _timed(work):
    start = time.perf_counter()
    result = work()
    return result, time.perf_counter() - start


# --- tables ---------------------------------------------------------------------------------------


def _errors(rows):
    """Errors in per cent of what is measured."""
    yield f"| model | plan | measured, bytes | {' | '.join(WAYS)} |"
    yield "|---|---|---:|" + "---:|" * len(WAYS)
    for name, plan, measured, found, _ in rows:
        errors = " | ".join(_per_cent(found[way], measured) for way in WAYS)
        yield f"| {name} | {plan} | {measured:,} | {errors} |"
    for title, of in (("mean of all", mean), ("largest", max)):
        errors = [of(abs(row[3][way] / row[2] - 1) for row in rows) for way in WAYS]
        yield f"| {title} | | | " + " | ".join(f"{error:.1%}" for error in errors) + " |"
    exact = sum(row[3]["vlmkit"] == row[2] for row in rows)
    yield ""
    yield f"Of {len(rows)} predictions of vlmkit {exact} are equal to the measured bytes."


def _per_cent(predicted, measured):
    return "0 bytes" if predicted == measured else f"{predicted / measured - 1:+.1%}"


def _seconds(rows):
    yield f"| seconds, median | {' | '.join(WAYS)} |"
    yield "|---|" + "---:|" * len(WAYS)
    for name in CHECKPOINTS:
        times = [[row[4][way] for row in rows if row[0] == name] for way in WAYS]
        yield f"| {name} | " + " | ".join(f"{median(t):.3f}" for t in times) + " |"


def _large(repeats):
    yield f"| {LARGE}, in nf4 | predicted, MB | seconds | peak MB beyond the imports |"
    yield "|---|---:|---:|---:|"
    for question in QUESTIONS:
        command = [sys.executable, __file__, "--predict", question]
        runs = []
        for _ in range(repeats):
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            runs.append(json.loads(done.stdout.splitlines()[-1]))
        total, seconds, peak = (median(run[i] for run in runs) for i in range(3))
        yield f"| {question} | {total / MEGABYTE:,.1f} | {seconds:.2f} | {peak:.0f} |"


def _predicted(question):
    """(bytes, seconds, MB) of a first prediction in this process, after the imports."""
    from vlmkit.backend.quiet import quiet

    with quiet():
        import peft  # noqa: F401
        import transformers.models.mllama.modeling_mllama  # noqa: F401

        import vlmkit as vk
        import vlmkit.memory.steps

        with _Memory() as memory:
            plan = "language_model=nf4"
            ledger, seconds = _timed(lambda: vk.memory.predict(LARGE, plan, **question))
    return ledger.total, seconds, memory.peak


if __name__ == "__main__":
    sys.exit(main())
