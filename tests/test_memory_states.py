"""What is there between passes, to the byte, for every family of `families.py`: keys and values,
adapters, gradients, and the states of optimizers, all of which have been through a step on the CPU.
"""

import bitsandbytes as bnb
import pytest
import torch
from families import FAMILIES, inputs

import vlmkit as vk
from vlmkit.finetuning import add_adapters
from vlmkit.memory import Ledger, cache_of, compare, measure, predict
from vlmkit.memory.batch import batch_of
from vlmkit.memory.ledger import CACHE

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIMIZERS = {
    "adamw_torch_fused": torch.optim.AdamW,
    "adamw_8bit": bnb.optim.AdamW8bit,
    "paged_adamw_32bit": bnb.optim.PagedAdamW,
    "paged_adamw_8bit": bnb.optim.PagedAdamW8bit,
}
DORA = {"language_model": vk.LoRA(r=4, use_dora=True, target_modules=r".*\.0\..*_proj|.*\.fc\d")}
WAYS = {
    "LoRA on nf4": ("recommended", {"language_model": vk.LoRA()}, "adamw_torch_fused"),
    "full": ("bf16", None, "adamw_torch_fused"),
    "full, 8 bits": ("bf16", None, "adamw_8bit"),
    "two ways": (
        "recommended",
        {"projector": "full", "language_model": vk.LoRA(r=4, target_modules="mlp")},
        "paged_adamw_32bit",
    ),
    "two LoRAs on nf4-dq": (
        "nf4-dq",
        {
            "vision_encoder": vk.LoRA(r=8, lora_alpha=4),
            "language_model": vk.LoRA(2, target_modules="attention"),
        },
        "paged_adamw_8bit",
    ),
    "LoRA on int8": ("int8", {"language_model": vk.LoRA(r=8)}, "adamw_8bit"),
    "DoRA on nf4-dq": ("nf4-dq", DORA, "adamw_torch_fused"),
    "DoRA on int8": ("int8", DORA, "adamw_8bit"),
}
NAMES = [name for name in WAYS if "DoRA" not in name]
SOME = {(family, NAMES[i % len(NAMES)]) for i, family in enumerate(FAMILIES)}
SOME |= {("qwen2_vl", "DoRA on int8")}


CASES = [
    (name, way) if (name, way) in SOME else pytest.param(name, way, marks=pytest.mark.slow)
    for name in FAMILIES
    for way in WAYS
]


def no_difference(predicted, measured):
    table = compare(predicted, measured)
    assert not table["difference"].any(), table[table["difference"] != 0].to_string()


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("name, way", CASES)
def test_between_two_steps(name, way, family):
    plan, training, optim = WAYS[way]
    folder = family(name)
    model, _ = vk.load(folder, plan, processor=False)
    training = training or dict.fromkeys(vk.anatomy(model).by_component, "full")
    predicted = predict(folder, plan, training=training, optim=optim)
    model = add_adapters(model, **training)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    stepper = OPTIMIZERS[optim](trained, lr=1e-4)
    tensors = inputs(model)
    model(**tensors, labels=tensors["input_ids"], use_cache=False).loss.backward()
    stepper.step()
    no_difference(predicted, measure(model, stepper))


def only_cache(ledger):
    return Ledger("", tuple(entry for entry in ledger.entries if entry.kind == CACHE))


@pytest.mark.parametrize("name", FAMILIES)
def test_keys_and_values(name, family):
    """After the prompt, and after twenty tokens more. Gemma 3's window of 16 is passed by both."""
    folder = family(name)
    model, _ = vk.load(folder, "bf16", processor=False)
    asked = {"tokens": 30, "images": 1, "image_size": (16, 16), "batch_size": 2}
    tensors = batch_of(model.config, folder, **asked).inputs(torch.randn)
    with torch.no_grad():
        output = model(**tensors, use_cache=True)
    cache = cache_of(output)
    no_difference(
        only_cache(predict(folder, "bf16", **asked)), only_cache(measure(model, cache=cache))
    )
    more = {"max_new_tokens": 21, "min_new_tokens": 21, "do_sample": False}  # the last is not fed
    cache = cache_of(model.generate(**tensors, **more, return_dict_in_generate=True))
    no_difference(
        only_cache(predict(folder, "bf16", new_tokens=20, **asked)),
        only_cache(measure(model, cache=cache)),
    )
