"""Reports: losses and evaluations to TensorBoard, trackio, W&B and others, by transformers' own
callbacks, so that a training that is continued has one report and not one for each call."""

import contextlib
import functools
import os
from pathlib import Path

FOLDER = "tensorboard"
"""Where TensorBoard's files are, below the folder of the training."""


@contextlib.contextmanager
def going_on(trainer, folder, done):
    """In this context, the reports of a training go on after the step `done`.

    transformers writes a new folder for TensorBoard in each call, and a new run for W&B. trackio
    goes on by the run's name. TensorBoard hides what a killed call wrote after `done`.
    """
    from accelerate.utils import patch_environment
    from transformers.integrations import TensorBoardCallback, WandbCallback

    wandb, names = None, {}
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback):
            callback.logging_dir = callback.logging_dir or str(Path(folder, FOLDER))
            if done:
                kind = callback._SummaryWriter
                callback._SummaryWriter = functools.partial(kind, purge_step=done + 1)
        if isinstance(callback, WandbCallback) and callback._wandb.run is None:
            wandb = callback._wandb
            names = {"WANDB_RUN_ID": trainer.args.run_name, "WANDB_RESUME": "allow"}
    names = {name: value for name, value in names.items() if name not in os.environ}
    with patch_environment(**names):
        yield
    if wandb is not None and wandb.run is not None:
        wandb.finish()  # the next training in this process is another run
