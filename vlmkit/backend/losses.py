"""The loss that a training minimizes, which its prediction runs too."""

import torch

IGNORED = -100
"""The label of a token that is not in the loss: transformers' and PyTorch's own."""


def loss_of_answers(outputs, labels, num_items_in_batch=None):
    """The loss of the labeled tokens: their sum over the number of all labeled tokens of the
    step, so that a batch in several parts, or on several processes, has the loss of the whole.

    transformers leaves this to a model's own loss, and some classes take the mean of each part
    (`accepts_loss_kwargs = False`): then a part with few labels counts as much as one with many.
    """
    logits = outputs["logits"][:, -labels.shape[1] :]  # BLIP-2 puts its pictures in front
    told = labels[:, 1:] != IGNORED  # a token is predicted from those before it
    found = logits[:, :-1][told].float()
    kind = {"reduction": "mean" if num_items_in_batch is None else "sum"}
    loss = torch.nn.functional.cross_entropy(found, labels[:, 1:][told], **kind)
    return loss if num_items_in_batch is None else loss / num_items_in_batch
