"""Adapters by component: what is asked is trained, all of it gets a gradient, and nothing else."""

import warnings

import peft
import pytest
import torch
from families import FAMILIES, differing, inputs, state
from PIL import Image

import vlmkit as vk
from vlmkit import plan
from vlmkit.anatomy import component_finder
from vlmkit.backend import checkpointing
from vlmkit.course.pictures import FIRST
from vlmkit.errors import FinetuningError
from vlmkit.evaluation.asking import prepared
from vlmkit.finetuning import add_adapters, continuing, targets
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
            warnings.simplefilter("ignore", FutureWarning)  # transformers has a newer one
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
        ({"vision_encoder": vk.LoRA(use_dora=True), "language_model": vk.LoRA()}, "one use_dora"),
        (
            {"language_model": vk.LoRA(target_modules=["q_proj", "q_prj"])},
            "'q_prj' matches nothing in language_model. Did you mean 'q_proj'.*down_proj, gate",
        ),
        ({"vision_encoder": vk.LoRA(target_modules=["gate_proj"])}, "nothing in vision_encoder"),
        ({"language_model": vk.LoRA(target_modules=["self_attn"])}, "Attention there gets no LoRA"),
        ({"language_model": vk.LoRA(target_modules=["embed_tokens"])}, "a Embedding there gets no"),
        (
            {"vision_encoder": vk.LoRA(target_modules=r".*(q_proj|patch_embedding)")},
            "patch_embedding, and a Conv2d there gets no LoRA.*are called fc1, fc2, k_proj",
        ),
    ],
)
def test_what_cannot_be_trained(ways, said, loaded):
    model, _ = loaded("pebble")
    wanted = trained(model).keys()
    with pytest.raises(FinetuningError, match=said):
        add_adapters(model, **ways)
    assert trained(model).keys() == wanted


def test_modules_by_name_are_those_of_the_component_alone(loaded):
    """peft's list also matches the vision encoder's q_proj, and its "all-linear" everything."""
    model, _ = loaded("pebble")
    layers = len(model.model.language_model.layers)

    def chosen(component, modules):
        (target,) = targets(model, {component: vk.LoRA(target_modules=modules)})
        return target.modules

    wanted = tuple(
        f"model.language_model.layers.{n}.self_attn.{p}_proj" for n in range(layers) for p in "qv"
    )
    listed = chosen("language_model", ["q_proj", "v_proj"])
    assert set(listed) == set(wanted) and len(listed) == 2 * layers
    assert chosen("language_model", r".*\.(q|v)_proj") == wanted
    assert chosen("language_model", r".*layers\.0\.self_attn\.q_proj") == wanted[:1]
    assert chosen("language_model", wanted[0].replace(".", r"\.")) == wanted[:1]
    assert chosen("language_model", ["lm_head", "q_proj"])[0] == "lm_head"
    for component in ("vision_encoder", "language_model"):
        everything = chosen(component, "all-linear")
        assert everything == chosen(component, "attention+mlp") and "lm_head" not in everything
    assert not set(chosen("vision_encoder", ["q_proj"])) & set(wanted)


def test_an_expression_cannot_hang(loaded, monkeypatch):
    monkeypatch.setattr(plan, "SECONDS", 0.1)
    model, _ = loaded("pebble")
    with pytest.raises(FinetuningError, match="target_modules: .*takes longer than"):
        targets(model, {"language_model": vk.LoRA(target_modules=r"(.|\w+|\.)+[!-]")})


@pytest.mark.parametrize(
    "given", ["nf4", *(pytest.param(p, marks=pytest.mark.slow) for p in ("fp32", "int8", "nf4-dq"))]
)
def test_dora_learns_comes_back_and_is_merged(given, loaded, tmp_path):
    model, batch = loaded("pebble", given)
    before = model.eval()(**batch).logits.detach()
    ways = {"language_model": vk.LoRA(r=4, use_dora=True, target_modules=["q_proj", "down_proj"])}
    model = add_adapters(model, **ways)
    near = 1e-2 * before.abs().max()  # peft rounds the lengths of the rows to the model's dtype
    assert torch.allclose(model.eval()(**batch).logits, before, atol=near)
    model.train()
    optimizer = torch.optim.AdamW(trained(model).values(), lr=1e-2)
    start = {name: p.detach().clone() for name, p in trained(model).items()}
    for _ in range(3):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    moved = {n.split(".")[-3] for n, p in trained(model).items() if not torch.equal(p, start[n])}
    assert moved == {"lora_A", "lora_B", "lora_magnitude_vector"}
    told = continuing._adapters(model)["language_model"]
    assert told.startswith("DoRA r=4")
    batch.pop("labels")
    with torch.no_grad():
        wanted = model.eval()(**batch).logits
        vk.finetuning.save(model, tmp_path / "kept")
        for load in (vk.finetuning.load, peft.PeftModel.from_pretrained):
            if given == "int8" and load is not vk.finetuning.load:
                continue  # plain peft fails on int8 layers of a CPU: see vlmkit.backend.dora
            again = load(vk.load("pebble", given)[0], tmp_path / "kept").eval()
            assert torch.equal(again(**batch).logits, wanted)
        merged, report = vk.finetuning.merge(model)
        assert torch.isfinite(merged(**batch).logits).all()
    if given == "fp32":
        assert torch.allclose(merged(**batch).logits, wanted, atol=1e-3)
        assert report["lost"].max() < 1e-5
    else:
        assert 0 < report["lost"].item() < 1


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
    with warnings.catch_warnings():  # peft would warn of embeddings, which are not saved
        warnings.simplefilter("error")
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
        ({"target_modules": "q_proj"}, r"a list of names, such as \['q_proj'\], or a regular"),
        ({"target_modules": ""}, r"a list of names, such as \['q_proj'\]"),
        ({"target_modules": []}, "a list of names, not"),
        ({"target_modules": ["q_proj", 3]}, "a list of names, not"),
        ({"target_modules": 3}, "target_modules is str or list or tuple, not 3"),
        ({"target_modules": "(.*proj"}, "cannot be used as a regular expression"),
        ({"dora": True}, "called 'use_dora' here"),
        ({"alpha": 16}, "'alpha' is not a field of a LoRA. It is called 'lora_alpha' here"),
        ({"rank": 8}, "called 'r' here"),
        ({"steps": 8}, "The names are r, lora_alpha"),  # of a training, so no hint
    ],
)
def test_values_that_make_no_adapter(values, said):
    with pytest.raises(FinetuningError, match=said):
        vk.LoRA(**values)


def test_fp16_is_not_mixed_with_bf16(tmp_path):
    model, processor = vk.load("pebble", "fp16")
    model = add_adapters(model, language_model=vk.LoRA(r=4))
    rows = list(vk.tasks.dataset("vqa", n=2))
    with pytest.raises(FinetuningError, match="bf16=False"):
        vk.finetuning.train(model, processor, rows, tmp_path, max_steps=1)
    run = vk.finetuning.train(model, processor, rows, tmp_path, max_steps=1, bf16=False)
    assert run.curve["loss"].notna().all()
    use = {"training": {"language_model": vk.LoRA(r=4)}, "tokens": 20, "images": 1}
    ways = [vk.memory.predict("pebble", "fp16", **use, bf16=bf16) for bf16 in (True, False)]
    assert ways[0] == ways[1]
