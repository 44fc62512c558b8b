"""The loop in which every stage of cobble learns: AdamW, checkpoints, a log."""

import csv
import dataclasses
import math
import time

import torch
from tqdm import tqdm

from vlmkit import tasks
from vlmkit.errors import VlmkitError
from vlmkit.folders import write_whole

CHUNK = 250
"""Steps between two checkpoints of a run."""


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How a stage learns: AdamW, a linear warm-up, then a cosine down to 2% of `learning_rate`."""

    max_steps: int
    batch_size: int
    learning_rate: float
    weight_decay: float = 0.0
    warmup_steps: int = 50

    def rate(self, step):
        """The learning rate of a step."""
        warm = min(1.0, (step + 1) / self.warmup_steps)
        cosine = 0.5 * (1 + math.cos(math.pi * step / self.max_steps))
        return self.learning_rate * warm * (0.02 + 0.98 * cosine)


def learn(name, folder, modules, parameters, settings, loss_of, device, seed=0):
    """Train until `settings.max_steps`, from the last checkpoint of this stage if there is one.

    name: of the stage. Its checkpoint is folder/NAME.progress.pt, and its log folder/NAME.csv.
    modules: {name: module}, what a checkpoint keeps of: parameters that learn, and running means.
    parameters: what the optimizer changes.
    loss_of: a function of a step that returns (loss, share of right answers) as scalar tensors.

    All randomness of a step depends on the seed, the stage and the step alone. So a run that was
    killed ends with the same weights as an unbroken one.

    Raises VlmkitError for a loss or a gradient that is not finite. Then the last checkpoint is the
    one before.
    """
    file = folder / f"{name}.progress.pt"
    optimizer = torch.optim.AdamW(
        parameters,
        lr=settings.learning_rate,
        betas=(0.9, 0.98),
        weight_decay=settings.weight_decay,
        fused=device.type == "cuda",
    )
    start, seconds, lines = 0, 0.0, []
    if file.exists():
        saved = torch.load(file, map_location=device)
        optimizer.load_state_dict(saved["optimizer"])
        for key, module in modules.items():
            module.load_state_dict(saved[key], strict=False)
        start, seconds, lines = saved["step"], saved["seconds"], saved["lines"]
    progress = tqdm(total=settings.max_steps, initial=start, desc=name, unit="step", mininterval=5)
    began, losses, shares, norms = time.perf_counter(), [], [], []
    for step in range(start, settings.max_steps):
        torch.manual_seed(tasks.generator(name, seed, step).getrandbits(48))
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss, right = loss_of(step)
        for group in optimizer.param_groups:
            group["lr"] = settings.rate(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(parameters, 1.0))
        optimizer.step()
        losses.append(loss.detach())
        shares.append(right.detach())
        progress.update()
        if (step + 1) % CHUNK == 0 or step + 1 == settings.max_steps:
            mean, share, norm = (
                torch.stack(each).mean().item() for each in (losses, shares, norms)
            )
            if not (math.isfinite(mean) and math.isfinite(norm)):
                raise VlmkitError(
                    f"The loss of the stage {name} is {mean} and the norm of its gradient {norm}, "
                    f"as means of the last {len(losses)} steps before step {step + 1}. These steps "
                    "were not saved. Start again with another --seed."
                )
            now = time.perf_counter()
            seconds, began = seconds + now - began, now
            lines.append([name, step + 1, f"{seconds:.0f}", f"{mean:.4f}", f"{share:.4f}"])
            progress.set_postfix(loss=f"{mean:.3f}", right=f"{share:.3f}")
            losses, shares, norms = [], [], []
            state = {"step": step + 1, "seconds": seconds, "lines": lines}
            state["optimizer"] = optimizer.state_dict()
            state |= {key: _kept(module) for key, module in modules.items()}
            write_whole(file, lambda path, state=state: torch.save(state, path))
    progress.close()
    _write_log(folder / f"{name}.csv", lines)


def _kept(module):
    """{name: tensor} of what a step of training changes in `module`: all but frozen parameters."""
    named = module.named_parameters(remove_duplicate=False)
    frozen = {name for name, parameter in named if not parameter.requires_grad}
    return {name: tensor for name, tensor in module.state_dict().items() if name not in frozen}


def _write_log(file, lines):
    def write(path):
        with path.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream, lineterminator="\n")
            writer.writerow(["stage", "step", "seconds", "loss", "right"])
            writer.writerows(lines)

    write_whole(file, write)
