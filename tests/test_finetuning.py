"""Adapters by component: what is asked is trained, all of it gets a gradient, and nothing else."""

import warnings

import pytest
import torch
from families import FAMILIES, differing, inputs, state
from PIL import Image

import vlmkit as vk
from vlmkit.anatomy import component_finder
from vlmkit.backend import checkpointing
from vlmkit.course.pictures import FIRST
from vlmkit.errors import FinetuningError
from vlmkit.evaluation.asking import prepared
from vlmkit.finetuning import add_adapters
from vlmkit.loading.audit import plain_name

pytestmark = pytest.mark.usefixtures("one_thread")

# llava's tower is read at its last layer but one; qwen2_vl has its projector inside the tower
SHARP = ("pebble", "llava", "qwen2_vl")


@pytest.fixture
def loaded(family):
    """loaded(name, plan) is (model, a batch with labels)."""

    def load(name, plan=None):
        if name == "pebble":
            model, processor = vk.load("pebble", plan)
            picture = Image.open(FIRST.path).convert("RGB")
            batch = dict(prepared(model, processor, [[picture]], [FIRST.question], 8))
        else:
            model, _ = vk.load(family(name), plan, processor=False)
            batch = inputs(model)
        return model, batch | {"labels": batch["input_ids"]}

    return load


def lora_everywhere(model):
    """A LoRA for every component but the projector, which is trained in full."""
    anatomy = vk.anatomy(model)
    others = ("vision_encoder", "cross_attention", "language_model")
    adapters = {c: vk.LoRA(r=2 + i) for i, c in enumerate(others) if anatomy[c].parameters}
    return {"projector": "full", **adapters}


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def gradients(model, batch):
    """{name: gradient} of one step. Dropout draws the same numbers each time."""
    torch.manual_seed(0)
    model.zero_grad()
    model(**batch).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# --- what is asked, and nothing else --------------------------------------------------------------


@pytest.mark.parametrize("name", ["pebble", *FAMILIES])
def test_only_what_is_asked_is_trained(name, loaded):
    model, _ = loaded(name)
    ways = lora_everywhere(model)
    component_of = component_finder(model)
    before = {n: p.dtype for n, p in model.named_parameters()}
    linears = {n for n, m in model.named_modules() if hasattr(m, "in_features")}
    model = add_adapters(model, **ways)
    found = {}
    for full, parameter in trained(model).items():
        found.setdefault(component_of(full), {})[full] = parameter
    assert set(found) == set(ways)
    whole = {plain_name(n).removeprefix("base_model.model."): p.dtype
             for n, p in found.pop("projector").items()}  # fmt: skip
    assert whole == {n: d for n, d in before.items() if component_of(n) == "projector"}
    for component, parameters in found.items():
        rank = ways[component].r
        adapted = set()
        for full, parameter in parameters.items():
            module, _, which = full.removesuffix(".default.weight").rpartition(".")
            assert parameter.shape[which == "lora_B"] == rank and parameter.dtype == torch.float32
            adapted.add(module.removeprefix("base_model.model."))
        head = {n for n in linears if n.endswith("lm_head")}
        assert adapted == {n for n in linears - head if component_of(n) == component}


@pytest.mark.parametrize("name", ["pebble", *FAMILIES])
def test_all_that_is_asked_gets_a_gradient(name, loaded):
    model, batch = loaded(name)
    model = add_adapters(model, **lora_everywhere(model))
    found = gradients(model, batch)
    without = {n for n in trained(model) if n not in found}
    if name in ("llava", "llava_next"):  # vision_feature_layer=-2: the last layer feeds nothing
        assert without == {n for n in trained(model) if "vision_tower.encoder.layers.1." in n}
    else:
        assert without == set()
    # B begins as zero, and so A's gradient is zero in the first step
    assert [n for n, g in found.items() if "lora_A" not in n and not g.any()] == []
    assert [n for n, g in found.items() if not g.isfinite().all()] == []


def test_the_start_of_adapters_is_that_of_their_seed(loaded):
    def start(drawn, **seed):
        torch.manual_seed(drawn)
        model = add_adapters(loaded("pebble")[0], language_model=vk.LoRA(r=4), **seed)
        after = torch.rand(1).item()
        torch.manual_seed(drawn)
        assert torch.rand(1).item() == after  # the caller's random numbers stay as they were
        return {n: p.clone() for n, p in trained(model).items() if "lora_A" in n}

    first, again, other = start(1), start(2), start(1, seed=1)
    assert first and all(torch.equal(first[n], again[n]) for n in first)
    assert not any(torch.equal(first[n], other[n]) for n in first)


def test_frozen_components_can_be_named_or_left_out(loaded):
    model, _ = loaded("pebble")
    model = add_adapters(model, vision_encoder=None, projector="full", language_model=None)
    assert type(model).__name__ == "LlavaForConditionalGeneration"  # no adapters, no wrapper
    assert len(trained(model)) == 4 and all("projector" in n for n in trained(model))


def test_the_whole_model_in_full(loaded):
    model, batch = loaded("qwen2_vl", "bf16")
    ways = dict.fromkeys(("vision_encoder", "projector", "language_model"), "full")
    model = add_adapters(model, **ways)
    assert len(trained(model)) == len(list(model.parameters())) == len(gradients(model, batch))
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


# --- a model under a plan -------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHARP)
def test_adapters_change_nothing_to_begin_with(name, loaded):
    model, batch = loaded(name)
    before, wanted = state(model), model(**batch).logits
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapted = add_adapters(model, **lora_everywhere(model))
    assert adapted.training and torch.equal(adapted.eval()(**batch).logits, wanted)
    vk.audit(adapted, "recommended")
    assert differing(before, state(adapted.unload())) == []


@pytest.mark.parametrize("name", SHARP)
def test_projector_in_full_beside_a_quantized_language_model(name, loaded):
    model, batch = loaded(name)
    before = state(model)
    adapted = add_adapters(model, projector="full", language_model=vk.LoRA(r=4))
    optimizer = torch.optim.AdamW(trained(adapted).values(), lr=1e-2)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = adapted(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert all(p.abs().sum() > 0 for n, p in trained(adapted).items() if "lora_B" in n)
    vk.audit(adapted, "recommended")
    component_of = component_finder(model)
    changed = set(differing(before, state(adapted.unload())))
    assert changed == {n for n in before if component_of(n) == "projector"}


@pytest.mark.parametrize("name", SHARP)
@pytest.mark.parametrize("way", ["reentrant", "plain", "older name"])
def test_gradient_checkpointing_gives_the_same_gradients(name, way, loaded):
    model, batch = loaded(name)
    model = add_adapters(model, **lora_everywhere(model))
    calls = []
    inside = "language_model.layers.0.self_attn"
    attention = next(m for n, m in model.named_modules() if n.endswith(inside))
    attention.register_forward_pre_hook(lambda *_: calls.append(1))
    wanted = gradients(model, batch)
    assert len(calls) == 1
    if way == "older name":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # transformers 5.23 has a newer one
            model.gradient_checkpointing_enable()
    else:
        checkpointing.enable(model, **{"use_reentrant": True} if way == "reentrant" else {})
    found = gradients(model, batch)
    assert len(calls) == 3  # the layer is run once more, in the backward pass
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[n], wanted[n]) for n in wanted)


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ways, said",
    [
        ({"projectr": "full"}, "Did you mean 'projector'"),
        ({"vision_tower": vk.LoRA()}, "The components are vision_encoder"),
        ({"projector": "ful"}, "projector: 'ful' is not a way to train a component.*vk.LoRA"),
        ({"language_model": True}, "language_model: True is not a way"),
        ({}, "nothing is trained"),
        ({"projector": None, "language_model": None}, "nothing is trained"),
        ({"cross_attention": vk.LoRA()}, "LlavaForCond.* has none: it has vision_encoder, proj"),
        ({"language_model": "full"}, "is quantized, and a quantized weight cannot be trained"),
        ({"projector": vk.LoRA(target_modules="attention")}, "projector has no Linear layer"),
        ({"vision_encoder": vk.LoRA(head=True)}, "vision_encoder has no output head"),
        ({"projector": vk.LoRA(r=10_000)}, "r is 10,000, and its widest layer is"),
        ({"language_model": vk.LoRA(), "seed": -1}, "seed is a whole number from 0"),
        ({"language_model": vk.LoRA(), "seed": "one"}, "seed is int, not 'one'"),
        (
            {"vision_encoder": vk.LoRA(lora_dropout=0.1), "language_model": vk.LoRA()},
            "one lora_dropout.*vision_encoder and language_model differ",
        ),
    ],
)
def test_what_cannot_be_trained(ways, said, loaded):
    model, _ = loaded("pebble")
    wanted = trained(model).keys()
    with pytest.raises(FinetuningError, match=said):
        add_adapters(model, **ways)
    assert trained(model).keys() == wanted


@pytest.mark.parametrize("given", ["recommended", "fp32"])
def test_the_head_learns_where_it_is_asked(given, loaded, tmp_path):
    model, batch = loaded("pebble", given)
    ways = {"language_model": vk.LoRA(r=4, head=True)}
    predicted = vk.memory.predict("pebble", given, training=ways).by_kind
    model = add_adapters(model, **ways)
    (head,) = (name for name in trained(model) if "lm_head" in name and "lora_B" in name)
    optimizer = torch.optim.AdamW(trained(model).values(), lr=1e-2)
    model(**batch).loss.backward()
    optimizer.step()
    assert model.get_parameter(head).any()
    measured = vk.memory.measure(model, optimizer).by_kind
    assert predicted == measured
    vk.finetuning.save(model, tmp_path / "kept")
    again = vk.finetuning.load(vk.load("pebble", given)[0], tmp_path / "kept")
    batch.pop("labels")
    with torch.no_grad():
        assert torch.equal(model.eval()(**batch).logits, again(**batch).logits)


def test_a_head_that_is_the_embedding_gets_no_adapter(family):
    model, _ = vk.load(family("qwen2_vl", tie=True), "bf16", processor=False)
    with pytest.raises(FinetuningError, match=r"lm_head is one matrix with the embedding \(tied\)"):
        add_adapters(model, language_model=vk.LoRA(head=True))


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
@pytest.mark.parametrize("given", ["nf4", "int8"])
def test_a_quantized_projector_is_not_trained_in_full(name, given, loaded):
    model, _ = loaded(name, given)
    with pytest.raises(FinetuningError) as error:
        add_adapters(model, projector="full", language_model=vk.LoRA())
    said = str(error.value)
    assert "projector is to be trained in full" in said and ".weight is quantized" in said
    assert "Plan a float format for it, or give it a vk.LoRA" in said
    model = add_adapters(model, projector=vk.LoRA(r=2))  # which is what can be done about it
    assert {component_finder(model)(n) for n in trained(model)} == {"projector"}


def test_adapters_on_adapters(loaded):
    model, _ = loaded("pebble")
    model = add_adapters(model, language_model=vk.LoRA())
    with pytest.raises(FinetuningError, match="has adapters already.*unload.*merge_and_unload"):
        add_adapters(model, projector="full")
    assert len(trained(add_adapters(model.unload(), projector="full"))) == 4


@pytest.mark.parametrize(
    "values, said",
    [
        ({"r": 0}, "r is a whole number from 1 to 65,536, not 0"),
        ({"r": -1}, "r is a whole number from 1"),
        ({"r": 10**18}, "r is a whole number from 1 to 65,536, not 1000000000000000000"),
        ({"lora_alpha": float("nan")}, "lora_alpha is a number above 0 .*not nan"),
        ({"lora_alpha": float("inf")}, "lora_alpha is a number above 0 .*not inf"),
        ({"lora_alpha": 0}, "lora_alpha is a number above 0"),
        ({"lora_alpha": -16}, "lora_alpha is a number above 0"),
        ({"lora_alpha": "16"}, "lora_alpha is int or float or None, not '16'"),
        ({"lora_dropout": 1.5}, "lora_dropout is a number from 0 to 1, not 1.5"),
        ({"lora_dropout": -0.1}, "lora_dropout is a number from 0"),
        ({"lora_dropout": float("nan")}, "lora_dropout is a number from 0"),
        ({"r": 8.0}, "r is int, not 8.0"),
        ({"r": True}, "r is int, not True"),
        ({"lora_dropout": 1}, "from 0 to below 1, not 1"),
        ({"target_modules": "atention"}, "Did you mean 'attention'"),
        ({"target_modules": ["q_proj"]}, r"one of attention\+mlp, .* not \['q_proj'\]"),
        ({"alpha": 16}, "'alpha' is not a field of a LoRA. It is called 'lora_alpha' here"),
        ({"rank": 8}, "called 'r' here"),
        ({"steps": 8}, "The names are r, lora_alpha"),  # of a training, so no hint
    ],
)
def test_values_that_make_no_adapter(values, said):
    with pytest.raises(FinetuningError, match=said):
        vk.LoRA(**values)
