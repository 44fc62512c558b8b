"""Teacher forcing: the logits of a model that is made to give an answer known beforehand.

One forward pass over prompt and answer gives the logits of every token of the answer, where
generating takes a pass each. As long as the most probable token is the answer's own, greedy
decoding would have given that answer; at the first that is not, it would have gone another way.
"""

import inspect

from vlmkit.evaluation.asking import generated


def extended(model, inputs, answers):
    """`inputs` (of prompts, padded on the left) followed by the tokens `answers`, (batch, tokens):
    the arguments of one forward pass, with the positions that `generate` would have counted."""
    import torch

    count = answers.shape[1]
    rest = {name: value for name, value in inputs.items() if name != "input_ids"}
    if "position_ids" not in rest and _takes_positions(model):
        rest["position_ids"] = model._prepare_position_ids_for_generation(
            inputs["input_ids"], dict(inputs)
        )
    # transformers' own way to lengthen a mask, positions and types, as after every new token
    rest = model._update_model_kwargs_for_generation(
        {}, rest, is_encoder_decoder=False, num_new_tokens=count
    )
    ids = torch.cat([inputs["input_ids"], answers], dim=1)
    if (mask := rest.get("cross_attention_mask")) is not None:  # lengthened by one, by Mllama
        last = mask[:, -1:].expand(-1, ids.shape[1] - mask.shape[1], *mask.shape[2:])
        rest["cross_attention_mask"] = torch.cat([mask, last], dim=1)
    return {"input_ids": ids, **rest}


def logits_of_answers(model, inputs, answers):
    """Logits of each token of `answers`, (batch, tokens, vocabulary), from one forward pass."""
    import torch

    with torch.no_grad():
        kept = {"logits_to_keep": answers.shape[1] + 1} if _keeps_logits(model) else {}
        logits = model(**extended(model, inputs, answers), use_cache=False, **kept).logits
    return logits[:, -answers.shape[1] - 1 : -1]


def _takes_positions(model):
    return "position_ids" in _parameters(model)


def _keeps_logits(model):
    return "logits_to_keep" in _parameters(model)


def _parameters(model):
    return inspect.signature(model.forward).parameters


def logits_by_steps(model, processor, inputs, answers):
    """The same from `generate`, which is made to choose these tokens: a pass for each, with what a
    model does between them. Raw logits, before any penalties of its generation config."""
    import torch
    from transformers import LogitsProcessor, LogitsProcessorList

    class Forced(LogitsProcessor):
        step = -1

        def __call__(self, input_ids, scores):
            self.step += 1
            chosen = torch.full_like(scores, float("-inf"))
            return chosen.scatter_(1, answers[:, self.step : self.step + 1], 0)

    result = generated(
        model,
        processor,
        inputs,
        answers.shape[1],
        logits_processor=LogitsProcessorList([Forced()]),
        output_logits=True,
        return_dict_in_generate=True,
    )
    return torch.stack(result.logits, dim=1)


def rows_of(inputs, rows):
    """The inputs of some rows of a batch, padded as they were; None where it cannot be told which
    part of a tensor belongs to which row.

    A tensor of images has as many for each row, unless it says that they differ in size.
    """
    import torch

    count = inputs["input_ids"].shape[0]
    for name in ("image_grid_thw", "image_sizes"):
        if name in inputs and len(inputs[name].unique(dim=0)) > 1:
            return None
    found = {}
    for name, value in inputs.items():
        if not isinstance(value, torch.Tensor) or len(value) % count:
            return None
        shares = value.reshape(count, len(value) // count, *value.shape[1:])
        found[name] = shares[rows].flatten(0, 1)
    return found
