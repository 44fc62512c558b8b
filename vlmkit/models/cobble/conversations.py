"""How cobble's projectors, and the adapters of cobble-chat, learn to answer."""

import contextlib

import torch

from vlmkit import finetuning, formats, tasks
from vlmkit.adapters import LoRA
from vlmkit.models.cobble import instructions, recipe, tensors
from vlmkit.models.cobble.loop import learn
from vlmkit.tasks import real

PROJECTOR_SHARES = {"photographs": 84, "digits": 20, "drawings": 12, "easy_vqa": 12}
CHAT_SHARES = {"photographs": 36, "facts": 12, "digits": 8, "drawings": 56, "easy_vqa": 16}
"""Rows of a batch of 128 that come from a source. Facts are questions about photographs that ask
for more than a name."""

SEVERAL = 2
"""How much more often than others a question about a drawing is asked that is about all of its
objects: count, count_color, exist. These are learned last."""


# --- the model ------------------------------------------------------------------------------------


def load_parts(folder, language_model_file, device, vision="bf16", language="bf16"):
    """(model with the trained vision encoder of `folder`, tokenizer). Its projector is fresh.

    vision, language: the formats that vision encoder and language model are rounded to.
    """
    from safetensors.torch import load_file

    language_model, tokenizer = recipe.read_language_model(language_model_file)
    model = recipe.build_model(language_model)
    model.model.vision_tower.load_state_dict(load_file(folder / "vision_encoder.safetensors"))
    model = model.to(device, torch.bfloat16)
    round_linear_layers(model.model.vision_tower, vision)
    round_linear_layers(model.model.language_model, language)
    return model, recipe.with_image_token(tokenizer)


def round_linear_layers(module, format):
    """Round the weights of all Linear layers of `module` to a format, in place, in their dtype.

    For "nf4" these are, to the bit, the weights with which a model loaded in NF4 computes.
    """
    if format in ("bf16", None):
        return
    for layer in module.modules():
        if isinstance(layer, torch.nn.Linear):
            weight = layer.weight.data
            if format == "int8":
                rounded = formats.dequantize(formats.quantize(weight, "int8"))
            else:
                rounded = formats.rounding(format).rounded(weight)
            layer.weight.data = rounded.to(weight.dtype)


def prepare_projector(model, pictures, seed, hidden=None):
    """Give `model` a fresh projector in float32, (n, 49, 192) to (n, 49, 576), and return it.

    hidden: the projector's width, by default that of the language model, as in LLaVA.

    The vision encoder's features differ widely from channel to channel. So the first layer begins
    with weights that take their mean and spread out, and the second ends at the spread of the
    language model's embeddings: that is where picture tokens have to arrive.
    """
    projector = model.model.multi_modal_projector
    device = model.device
    hidden = hidden or recipe.LANGUAGE_WIDTH
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        first = torch.nn.Linear(recipe.VISION_WIDTH, hidden)
        second = torch.nn.Linear(hidden, recipe.LANGUAGE_WIDTH)
        projector.linear_1, projector.linear_2 = first.to(device), second.to(device)
        pixels = tensors.pixel_values(pictures["photographs-train"][:512])
        tower = model.model.vision_tower
        features = tower(pixels.to(tower.dtype), output_hidden_states=True).hidden_states[-1]
        features = features.float().flatten(0, 1)
        mean, spread = features.mean(0), features.std(0).clamp(min=1e-3)
        projector.linear_1.weight /= spread
        projector.linear_1.bias -= projector.linear_1.weight @ mean
        reached = projector(features).std()
        wanted = model.get_input_embeddings().weight.float().std()
        projector.linear_2.weight *= wanted / reached
        projector.linear_2.bias *= wanted / reached
    return projector


def naming(model, tokenizer, pictures, most=1_000):
    """(share that the model names in free text, number) of the first `most` test photographs."""
    test, labels = pictures["photographs-test"][:most], pictures["photographs-test-labels"][:most]
    questions = ["What is in the picture?"] * len(test)
    found = tensors.answers(model, tokenizer, questions, tensors.pixel_values(test))
    things = [real.THINGS[label] for label in labels.tolist()]
    return sum(map(instructions.is_right, found, things)) / len(test), len(test)


# --- what is asked --------------------------------------------------------------------------------


class Conversations:
    """Batches of pictures with questions and answers.

    pictures: `arrays.Arrays`. shares: PROJECTOR_SHARES or CHAT_SHARES. answers: of
        `own_words.own_answers`, for CHAT_SHARES.
    """

    def __init__(self, pictures, shares, batch_size, answers=None):
        self.pictures, self.answers = pictures, answers or {}
        self.sizes = {name: max(1, rows * batch_size // 128) for name, rows in shares.items()}
        self.labels = {
            name: pictures[f"{name}-train-labels"].tolist() for name in ("photographs", "digits")
        }

    def batch(self, rng, device):
        """(rows for `Prompts.training_batch`, pixel values (rows, 3, 84, 84))."""
        rows, pixels = [], []
        for name, size in self.sizes.items():
            source = "photographs" if name == "facts" else name
            seen = self.pictures[f"{source}-train"]
            chosen = [rng.randrange(len(seen)) for _ in range(size)]
            part = seen[torch.tensor(chosen, device=seen.device)]
            if source == "photographs":
                pixels.append(tensors.pixel_values(tensors.varied_photographs(part)))
            elif source == "digits":
                pixels.append(tensors.varied_digits(part))
            else:
                pixels.append(tensors.pixel_values(part))
            rows += [(*self._ask(name, i, rng), True) for i in chosen]
        return rows, torch.cat(pixels).to(device)

    def _ask(self, name, i, rng):
        """(question, answer) about picture `i` of a source."""
        if name == "photographs":
            return instructions.about_photograph(self.labels[name][i], rng)
        if name == "facts":
            return instructions.about_facts(self.labels["photographs"][i], rng, self.answers)
        if name == "digits":
            return instructions.about_digit(self.labels[name][i], rng)
        if name == "drawings":
            asked = self.pictures["drawings-questions"][i]
            often = [SEVERAL if kind.startswith(("count", "exist")) else 1 for kind, *_ in asked]
            return rng.choices(asked, often)[0][1:]
        return rng.choice(self.pictures["easy_vqa-train-questions"][i])


# --- training -------------------------------------------------------------------------------------


def train_projector(
    folder, model, pictures, tokenizer, device, settings, name, seed=0, hidden=None
):
    """Train a fresh projector of `model`, all else frozen. Returns its state in bf16.

    name: of the stage, see `learn`. hidden: see `prepare_projector`.
    """
    model.requires_grad_(False)
    projector = prepare_projector(model, pictures, seed, hidden).requires_grad_(True)
    conversations = Conversations(pictures, PROJECTOR_SHARES, settings.batch_size)
    modules = {"projector": projector}
    _train_answers(name, folder, model, modules, conversations, tokenizer, device, settings, seed)
    projector.to(torch.bfloat16)
    return {key: tensor.cpu().contiguous() for key, tensor in projector.state_dict().items()}


def train_chat(folder, model, pictures, tokenizer, device, settings, answers, words, seed=0):
    """Train adapters on the language model, which is rounded already, and its projector.

    answers: of `own_words.own_answers`. words: `own_words.OwnWords`. Writes folder/adapters as
    `vk.finetuning.save` does, and returns the model with its adapters.
    """
    torch.manual_seed(seed)
    model.model.multi_modal_projector.float()
    lora = LoRA(r=4, lora_alpha=8)
    adapted = finetuning.add_adapters(model, projector="full", language_model=lora).to(device)
    conversations = Conversations(pictures, CHAT_SHARES, settings.batch_size, answers)
    base, modules = adapted.get_base_model(), {"adapted": adapted}
    _train_answers(
        "chat", folder, base, modules, conversations, tokenizer, device, settings, seed, words
    )
    finetuning.save(adapted.to(torch.bfloat16), folder / "adapters", overwrite=True)
    return adapted


def _train_answers(
    name, folder, model, modules, conversations, tokenizer, device, settings, seed, words=None
):
    """Train whatever requires gradients, on `conversations` and, where given, on `words`."""
    prompts = tensors.Prompts(tokenizer)

    def loss_of(step):
        rng = tasks.generator(name, seed, step, "rows")
        rows, pixels = conversations.batch(rng, device)
        batch = prompts.training_batch(rows, device)
        loss, right = tensors.answer_loss(model, batch, pixels.bfloat16())
        if words is not None:
            loss = loss + words.loss(model, rng, device)
        return loss, right

    parameters = [p for p in model.parameters() if p.requires_grad]
    with _compiled(model.model.language_model.layers, device):
        learn(name, folder, modules, parameters, settings, loss_of, device, seed)


@contextlib.contextmanager
def _compiled(layers, device):
    """Compiled layers on a GPU, where their many small operations cost more than their products.
    All layers share one compilation. Afterwards they are as before, since generation would compile
    again for every length."""
    if device.type == "cuda":
        for layer in layers:
            layer.compile(dynamic=True)
    try:
        yield
    finally:
        for layer in layers:
            layer._compiled_call_impl = None
