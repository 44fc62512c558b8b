"""Teacher forcing: the logits of a model for an answer that is known beforehand.

One forward pass over prompt and answer gives the logits of every token of the answer. Generating
the answer takes a pass for each token. As long as the most probable token is the answer's own,
greedy decoding gives that answer; at the first token that is not, decoding gives another answer.
"""

import contextlib
import copy
import functools
import inspect

from vlmkit.evaluation.asking import generated

ROOM = 4 * 10**9
"""At most so many bytes of visual features are kept. Others are computed each time."""


def extended(model, inputs, answers):
    """The arguments of one forward pass over `inputs` followed by the tokens `answers`.

    inputs: of prompts, padded on the left. answers: (batch, tokens). The positions are those that
    `generate` would have counted.
    """
    import torch

    count = answers.shape[1]
    rest = {name: value for name, value in inputs.items() if name != "input_ids"}
    if "position_ids" not in rest and _takes(model, "position_ids"):
        rest["position_ids"] = model._prepare_position_ids_for_generation(
            inputs["input_ids"], dict(inputs)
        )
    # transformers' own way to extend masks, positions and types, as after every new token
    rest = model._update_model_kwargs_for_generation(
        {}, rest, is_encoder_decoder=False, num_new_tokens=count
    )
    ids = torch.cat([inputs["input_ids"], answers], dim=1)
    if (mask := rest.get("cross_attention_mask")) is not None:  # Mllama extends it by one only
        last = mask[:, -1:].expand(-1, ids.shape[1] - mask.shape[1], *mask.shape[2:])
        rest["cross_attention_mask"] = torch.cat([mask, last], dim=1)
    return {"input_ids": ids, **rest}


def logits_of_answers(model, inputs, answers):
    """Logits of each token of `answers`, (batch, tokens, vocabulary), from one forward pass."""
    import torch

    with torch.no_grad():
        count = answers.shape[1]
        kept = {"logits_to_keep": count + 1} if _takes(model, "logits_to_keep") else {}
        logits = model(**extended(model, inputs, answers), use_cache=False, **kept).logits
    return logits[:, -count - 1 : -1]


def _takes(model, argument):
    return argument in inspect.signature(model.forward).parameters


def end_tokens(model):
    """The tokens that end an answer, a tensor."""
    import torch

    ends = model.generation_config.eos_token_id
    return torch.tensor([] if ends is None else ends if isinstance(ends, list) else [ends])


def logits_by_steps(model, processor, inputs, answers):
    """The same logits from `generate`, which is made to choose these tokens: one pass for each.

    These are raw logits, before any penalties of the model's generation config.
    """
    import torch
    from transformers import LogitsProcessor, LogitsProcessorList

    class Forced(LogitsProcessor):
        step = -1

        def __call__(self, input_ids, scores):
            self.step += 1
            forced = torch.full_like(scores, float("-inf"))
            return forced.scatter_(1, answers[:, self.step : self.step + 1], 0)

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
    """The inputs of some rows of a batch, with the same padding. None if it is not clear which part
    of a tensor belongs to which row.

    A tensor of images has equally many entries for each row, unless the images differ in size.
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


class VisualFeatures:
    """The visual features of batches, computed once and used again.

    They are the results of `get_image_features`, which most models of transformers call for their
    visual features. A model without this method computes its features each time.
    """

    def __init__(self, model, room=ROOM):
        self.modules = [m for m in model.modules() if hasattr(m, "get_image_features")]
        self.kept, self.room = {}, room

    @contextlib.contextmanager
    def used(self, *, keep=False):
        """Within it, `get_image_features` returns copies of the results that are kept for the same
        tensors, the same objects in memory. keep: also keep new results."""
        name = "get_image_features"
        own = [(module, module.__dict__.get(name)) for module in self.modules]
        try:
            for module, _ in own:
                module.get_image_features = self._looked_up(module.get_image_features, keep)
            yield
        finally:
            for module, before in own:
                module.__dict__.pop(name, None)
                if before is not None:
                    module.get_image_features = before

    def _looked_up(self, compute, keep):
        import torch

        @functools.wraps(compute)
        def features(*args, **kwargs):
            given = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
            key = (compute.__self__, *map(id, given))
            if key in self.kept:
                return copy.deepcopy(self.kept[key][1])
            found = compute(*args, **kwargs)
            size = sum(tensor.nbytes for tensor in _tensors(found))
            if keep and given and size <= self.room:
                self.room -= size
                self.kept[key] = (given, copy.deepcopy(found))  # holds `given`: ids stay unique
            return found

        return features


def _tensors(x):
    import torch

    if isinstance(x, torch.Tensor):
        yield x
    elif isinstance(x, (dict, list, tuple)):  # transformers' outputs are dicts
        for value in x.values() if isinstance(x, dict) else x:
            yield from _tensors(value)
