"""How cobble's vision encoder learns, with a convolutional network as its teacher.

The teacher learns the photographs. The vision encoder learns what the teacher sees in them, and
also digits, and what is where in drawings and in the pictures of easy-VQA. The teacher and the
heads that read the targets are not kept.
"""

import torch
import torch.nn.functional as F

from vlmkit.folders import write_whole
from vlmkit.models.cobble import recipe, tensors
from vlmkit.models.cobble.loop import learn
from vlmkit.models.pebble import batches
from vlmkit.tasks import real

EASY_SHAPES = ("circle", "rectangle", "triangle")
EASY_COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SIXTEENTHS = {"photographs": 11, "digits": 1, "drawings": 3, "easy_vqa": 1}
"""How the vision encoder's batch is split between sources of pictures."""


# --- the teacher ----------------------------------------------------------------------------------


class Residual(torch.nn.Module):
    """(n, before, h, w) to (n, after, h / 2, w / 2): a convolution and a pool, then two more
    convolutions whose result is added."""

    def __init__(self, before, after):
        super().__init__()
        self.first = torch.nn.Sequential(_convolution(before, after), torch.nn.MaxPool2d(2))
        self.more = torch.nn.Sequential(*[_convolution(after, after) for _ in range(2)])

    def forward(self, x):
        x = self.first(x)
        return x + self.more(x)


def _convolution(before, after):
    return torch.nn.Sequential(
        torch.nn.Conv2d(before, after, 3, padding=1, bias=False),
        torch.nn.BatchNorm2d(after),
        torch.nn.ReLU(inplace=True),
    )


def build_teacher():
    """A small residual network (He et al., 2016, arXiv 1512.03385): (n, 3, 32, 32) in [-1, 1] to
    (n, 10) logits."""
    return torch.nn.Sequential(
        _convolution(3, 64),
        Residual(64, 128),
        Residual(128, 256),
        Residual(256, 512),
        torch.nn.AdaptiveMaxPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(512, len(real.THINGS)),
    )


def train_teacher(folder, pictures, device, seed, settings):
    """The trained teacher, frozen. It comes from folder/teacher.pt if that file exists."""
    done = folder / "teacher.pt"
    torch.manual_seed(seed)
    teacher = build_teacher().to(device, memory_format=torch.channels_last)
    if done.exists():
        teacher.load_state_dict(torch.load(done, map_location=device))
        return teacher.eval().requires_grad_(False)
    photos, labels = pictures["photographs-train"], pictures["photographs-train-labels"]

    def loss_of(step):
        chosen = torch.randint(len(photos), (settings.batch_size,), device=device)
        seen = tensors.varied_photographs(photos[chosen]) / 127.5 - 1
        logits = teacher(seen.contiguous(memory_format=torch.channels_last)).float()
        loss = F.cross_entropy(logits, labels[chosen], label_smoothing=0.1)
        return loss, (logits.argmax(-1) == labels[chosen]).float().mean()

    parameters = list(teacher.parameters())
    learn("teacher", folder, {"teacher": teacher}, parameters, settings, loss_of, device, seed)
    teacher.eval().requires_grad_(False)
    write_whole(done, lambda path: torch.save(teacher.state_dict(), path))
    share = share_right(lambda seen: teacher(seen.float() / 127.5 - 1), pictures, "photographs")
    print(f"teacher: {share:.4f} of the test photographs", flush=True)
    return teacher


# --- the vision encoder ---------------------------------------------------------------------------


def build_encoder(seed=0):
    """A fresh vision encoder in float32: (n, 3, 84, 84) to features (n, 49, 192)."""
    from transformers import SiglipVisionModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return SiglipVisionModel(recipe.build_config().vision_config)


class Heads(torch.nn.Module):
    """Reads one target from features (n, 49, width). Photographs, digits, and the shape and color
    in easy-VQA are read from the mean of the patches: (n, classes). pebble's targets are read from
    each patch: (n, 49, classes), through noise, so that each target must take enough room in the
    features."""

    POOLED = {
        "photographs": len(real.THINGS),
        "digits": len(real.DIGITS),
        "shape": len(EASY_SHAPES),
        "color": len(EASY_COLORS),
    }
    NOISE = 0.5

    def __init__(self, width):
        super().__init__()
        pooled, dense = self.POOLED.items(), batches.TARGETS.items()
        self.pooled = torch.nn.ModuleDict({n: torch.nn.Linear(width, size) for n, size in pooled})
        self.dense = torch.nn.ModuleDict({n: torch.nn.Linear(width, size) for n, size in dense})

    def forward(self, features, name):
        features = F.layer_norm(features.float(), features.shape[-1:])
        if name in self.pooled:
            return self.pooled[name](features.mean(1))
        return self.dense[name](features + self.NOISE * torch.randn_like(features))


def easy_vqa_facts(questions):
    """[shape, color] of a picture of easy-VQA as indices, -100 where no answer names it."""
    answers = {answer for _, answer in questions}
    return [
        next((i for i, name in enumerate(names) if name in answers), tensors.IGNORED)
        for names in (EASY_SHAPES, EASY_COLORS)
    ]


def train_vision_encoder(folder, encoder, pictures, device, seed, settings, teacher):
    """Train `encoder` in place. Of photographs it learns only the distribution that the teacher
    gives for the same mixed pictures (Beyer et al., 2022, arXiv 2106.05237, "A good teacher is
    patient and consistent")."""
    torch.manual_seed(seed)
    heads = Heads(recipe.VISION_WIDTH).to(device)
    facts = [easy_vqa_facts(rows) for rows in pictures["easy_vqa-train-questions"]]
    facts = torch.tensor(facts, device=device)
    sizes = {name: max(1, settings.batch_size * share // 16) for name, share in SIXTEENTHS.items()}

    def some(name):
        """(indices, pictures) of a source, drawn for one batch."""
        rows = pictures[f"{name}-train"]
        chosen = torch.randint(len(rows), (sizes[name],), device=device)
        return chosen, rows[chosen]

    def loss_of(step):
        photos = _mixed(tensors.varied_photographs(some("photographs")[1]))
        with torch.no_grad():
            seen = (photos / 127.5 - 1).contiguous(memory_format=torch.channels_last)
            target = teacher(seen).float().softmax(-1)
        digit, digits = some("digits")
        drawing, drawings = some("drawings")
        easy, shapes = some("easy_vqa")
        pixels = [tensors.pixel_values(x) for x in (photos, drawings, shapes)]
        pixels = torch.cat([*pixels, tensors.varied_digits(digits)])
        features = encoder(pixel_values=pixels, output_hidden_states=True).hidden_states[-1]
        of_photos, of_drawings, of_shapes, of_digits = features.split(
            [len(photos), len(drawing), len(easy), len(digit)]
        )
        logits = heads(of_photos, "photographs")
        loss = 2 * F.cross_entropy(logits, target)
        right = (logits.argmax(-1) == target.argmax(-1)).float().mean()
        labels = pictures["digits-train-labels"][digit]
        loss = loss + 0.5 * F.cross_entropy(heads(of_digits, "digits"), labels)
        for i, name in enumerate(("shape", "color")):
            loss = loss + 0.5 * F.cross_entropy(heads(of_shapes, name), facts[easy, i])
        marks = pictures["drawings-marks"][drawing]
        filled = marks[:, 0] > 0
        for i, name in enumerate(batches.TARGETS):
            found, true = heads(of_drawings, name).flatten(0, 1), marks[:, i].flatten()
            each = F.cross_entropy(found, true, reduction="none").view_as(filled)
            loss = loss + 0.2 * (each[filled].mean() + each[~filled].mean())
        return loss, right

    modules = {"encoder": encoder, "reader": heads}
    parameters = [p for module in modules.values() for p in module.parameters()]
    encoder.train()
    learn("vision_encoder", folder, modules, parameters, settings, loss_of, device, seed)
    encoder.eval()
    heads.eval()

    def reads(name):
        def logits(seen):
            pixels = tensors.pixel_values(seen)
            states = encoder(pixel_values=pixels, output_hidden_states=True).hidden_states
            return heads(states[-1], name)

        return logits

    for name in ("photographs", "digits"):
        share = share_right(reads(name), pictures, name)
        print(f"vision_encoder: {share:.4f} of the test {name}", flush=True)


def _mixed(photos):
    """Half of the photographs, mixed with others of the batch in random shares."""
    share = torch.rand(len(photos), 1, 1, 1, device=photos.device)
    share = torch.where(torch.rand_like(share) < 0.5, share, 1.0)
    return share * photos + (1 - share) * photos.flip(0)


@torch.no_grad()
def share_right(logits_of, pictures, name):
    """The share of test pictures whose class is right. logits_of: a function of (n, 3, h, w)
    uint8."""
    test, labels = pictures[f"{name}-test"], pictures[f"{name}-test-labels"]
    right = 0
    for start in range(0, len(test), 1000):
        part = slice(start, start + 1000)
        with torch.autocast(test.device.type, dtype=torch.bfloat16):
            found = logits_of(test[part]).argmax(-1)
        right += (found == labels[part]).sum().item()
    return right / len(test)
