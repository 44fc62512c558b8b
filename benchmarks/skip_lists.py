"""The museum of skip lists: what published lists protect in the models of the catalog.

    python benchmarks/skip_lists.py                         # two minutes on one core, no weights
    python benchmarks/skip_lists.py --output trial.csv

`skip_lists.json` holds the lists: name, method, source (where each was seen), and entries. A list
is tried on all models of the catalog, by the rule that its method has in the installed transformers
(`vlmkit.linting.methods`). No weight is read.

The result is results/skip_lists.csv: a row for each list and model with the Linear layers of the
vision encoder, the projector, the head and the language model, and how many of them the list keeps
out of quantization. `why` says why no layer of the vision encoder is kept: the entry is in the
middle of the full names, or no entry names the module at all. Models that have no Linear layer in a
component have 0 there.
"""

import argparse
import csv
import json
from pathlib import Path

HERE = Path(__file__).resolve().parent
LISTS = json.loads((HERE / "skip_lists.json").read_text(encoding="utf-8"))
OUTPUT = HERE / "results" / "skip_lists.csv"
PARTS = ("vision_encoder", "projector", "head", "language_model")
MIDDLE, ABSENT = "the entry is in the middle of the full names", "no entry names the module"


def main(argv=None):
    parser = argparse.ArgumentParser(description="What published skip lists protect.")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args(argv)
    import vlmkit as vk

    rows = [row for name in vk.catalog.NAMES for row in rows_of(name, LISTS)]
    with open(arguments.output, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    for published in LISTS:
        own = [row for row in rows if row["list"] == published["name"] and row["vision_encoder"]]
        whole = sum(row["vision_encoder_kept"] == row["vision_encoder"] for row in own)
        none = sum(row["vision_encoder_kept"] == 0 for row in own)
        print(f"{published['name']:45} all {whole:2}  none {none:2}  of {len(own)} models")


def rows_of(name, lists):
    """A row for each of `lists` on the model `name` of the catalog."""
    import transformers

    from vlmkit.anatomy import on_meta
    from vlmkit.backend.quiet import quiet
    from vlmkit.catalog import folder_of
    from vlmkit.linting.methods import METHODS
    from vlmkit.linting.verdicts import Given, verdicts_by_rule

    with quiet():
        config = transformers.AutoConfig.from_pretrained(folder_of(name))
        model = on_meta(config)
    for published in lists:
        method = METHODS[published["method"]]
        groups = {"all": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int"}}}
        given = {method.key: published["list"], "config_groups": groups}
        verdicts = verdicts_by_rule(model, Given(given, {}, method))
        yield {
            "list": published["name"],
            "method": method.name,
            "model": name,
            "model_type": config.model_type,
            **_counts(verdicts),
            "why": _why(verdicts, published["list"]),
        }


def _counts(verdicts):
    counts = {}
    for part in PARTS:
        layers = [row for row in verdicts if row.convertible and _part(row) == part]
        counts |= {part: len(layers), f"{part}_kept": sum(not row.quantized for row in layers)}
    return counts


def _part(row):
    return "head" if row.kind == "head" else row.component


def _why(verdicts, entries):
    layers = [row for row in verdicts if row.convertible and row.component == PARTS[0]]
    if not layers or not all(row.quantized for row in layers):
        return ""
    names = [entry.removeprefix("re:").replace("\\", "").strip(".*") for entry in entries]
    whole = (f".{name}." in f".{row.module}." for name in names for row in layers)
    return MIDDLE if any(whole) else ABSENT


if __name__ == "__main__":
    main()
