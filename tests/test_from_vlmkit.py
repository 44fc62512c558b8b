"""docs/from_vlmkit.md: its code and its `vlmkit` commands run in order, and do what it says."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from families import FAMILIES
from peft import PeftModel
from safetensors.torch import load_file
from test_saved import BARE, WAYS, logits
from transformers import AutoModelForImageTextToText

import vlmkit as vk
from vlmkit import cli

pytestmark = pytest.mark.usefixtures("one_thread")

PAGE = (Path(__file__).parent.parent / "docs" / "from_vlmkit.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
ELSEWHERE = ("vllm ", "python convert_", "llama-")  # what cannot run here


def same_weights(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def nothing(space):
    pass


def the_same_plan(space):
    vk.audit(space["model"], "recommended")


def the_same_model(space):
    """On some CPUs transformers alone computes NF4 with another kernel, which rounds more."""
    assert same_weights(space["plain"], space["model"])
    wanted, found = (logits(space[m], space["processor"]) for m in ("model", "plain"))
    assert (found - wanted).abs().max() < 0.02 * wanted.abs().max()


def a_folder_of_adapters(space):
    table = PAGE.partition("These files are in it:")[2].partition("\n\n`vk.fine")[0]
    named = {name for row in table.splitlines()[3:] for name in re.findall(r"`([\w.]+\.\w+)`", row)}
    assert named >= {path.name for path in Path("adapters").iterdir()}
    assert "float32" in Path("adapters/README.md").read_text()


def as_in_vlmkit(space):
    """Adapters and projector, in plain peft; the projector is rounded, as vlmkit says."""
    base = vk.load("base", "bf16")[0]
    untrained = logits(base, space["processor"])
    with pytest.warns(UserWarning, match="Rounding loses 0"):
        model = vk.finetuning.load(base, "adapters")
    space["wanted"] = logits(model, space["processor"])
    assert not torch.equal(untrained, space["wanted"])
    assert torch.equal(logits(space["plain"], space["processor"]), space["wanted"])
    in_full = load_file("adapters/trained_in_full.safetensors")
    in_base = vk.load("base", "bf16")[0]
    held = dict(space["plain"].get_base_model().named_parameters())
    for name, tensor in in_full.items():
        module, _, leaf = name.rpartition(".linear_")
        found = held[f"{module}.modules_to_save.default.linear_{leaf}"]
        assert torch.equal(found, tensor.bfloat16())
        assert not torch.equal(found, in_base.get_parameter(name))


def on_nf4(space):
    with pytest.warns(UserWarning, match="Rounding loses"):
        model = vk.finetuning.load(vk.load("base")[0], "adapters")
    wanted = logits(model, space["processor"])
    found = logits(space["in_nf4"], space["processor"])
    assert (found - wanted).abs().max() < 0.02 * wanted.abs().max()


def merged_twice(space):
    names = [set(load_file(f"{folder}/model.safetensors")) for folder in ("base", "merged")]
    assert names[0] == names[1]
    vk.audit(vk.load("merged-nf4")[0], "recommended")


def of_merged(space):
    found = logits(space["merged"], space["processor"])
    assert (found - space["wanted"]).abs().max() < 0.02 * space["wanted"].abs().max()


def the_same_bits(space):
    again = AutoModelForImageTextToText.from_pretrained("merged-by-peft")
    assert same_weights(again, space["merged"])


def adapters_alone(space):
    assert json.loads(Path("lora/adapter_config.json").read_text())["modules_to_save"] is None
    assert all(".lora_" in name for name in load_file("lora/adapter_model.safetensors"))


def nothing_is_rounded(space):
    assert torch.equal(logits(space["apart"], space["processor"]), space["wanted"])


AFTER = (
    nothing, the_same_plan, the_same_model, a_folder_of_adapters, as_in_vlmkit, on_nf4,
    merged_twice, of_merged, the_same_bits, adapters_alone, nothing_is_rounded,
)  # fmt: skip


@pytest.mark.filterwarnings("ignore:What was trained in full")
def test_the_page_in_order(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    ours = [(kind, code) for kind, code in BLOCKS if not code.startswith(ELSEWHERE)]
    assert len(BLOCKS) - len(ours) == 4
    space = {}
    for (kind, code), check in zip(ours, AFTER, strict=True):
        if kind == "python":
            exec(compile(code, check.__name__, "exec"), space)
        else:
            for line in code.splitlines():
                assert cli.main(shlex.split(line.removeprefix("vlmkit "))) == 0
            assert capsys.readouterr().out.count("Lost by rounding") == 2
        check(space)


def test_the_count_of_the_page():
    """Of the cases that `test_plain_peft_has_the_same_bits_or_says_what_it_lacks` goes through."""
    cases = len(FAMILIES) * len(WAYS)
    assert f"in {cases - 2 * len(BARE)} of {cases} cases" in PAGE


def test_peft_says_what_the_page_says(family, tmp_path):
    """Where peft cannot hold what was trained: its own words, which the page quotes."""
    base = family("llava_next")
    model = vk.load(base, "bf16", processor=False)[0]
    model = vk.finetuning.add_adapters(model, projector="full", language_model=vk.LoRA(r=1))
    both = vk.finetuning.save(model, tmp_path / "both")
    quoted = re.search(r'\("(Unexpected keyword.*?)"\)', PAGE, re.DOTALL)[1]
    plain = AutoModelForImageTextToText.from_pretrained(base)
    with pytest.warns(UserWarning, match=re.escape(" ".join(quoted.split()))):
        PeftModel.from_pretrained(plain, both)
    model = vk.load(base, "bf16", processor=False)[0]
    model = vk.finetuning.add_adapters(model, projector="full")
    alone = vk.finetuning.save(model, tmp_path / "alone")
    plain = AutoModelForImageTextToText.from_pretrained(base)
    with pytest.raises(ValueError, match=r"Can't find 'adapter_config\.json'"):
        PeftModel.from_pretrained(plain, alone)
    assert "Can't find 'adapter_config.json'" in PAGE
