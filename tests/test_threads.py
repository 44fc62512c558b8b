"""Several threads: they load one after the other, and nothing of the process stays changed."""

import threading

import pytest
import torch

import vlmkit as vk
from vlmkit.errors import SensitivityError


def in_threads(count, work):
    """What `work(i)` returned or raised in each of `count` threads that start together."""
    results, start = [None] * count, threading.Barrier(count)

    def run(i):
        start.wait()
        try:
            results[i] = work(i)
        except Exception as error:
            results[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def state_of_process():
    import gc
    import os

    from transformers.utils import logging

    return (
        torch.get_default_dtype(),
        torch.get_num_threads(),
        logging.get_verbosity(),
        logging.is_progress_bar_enabled(),
        gc.isenabled(),
        dict(os.environ),
    )


def test_models_load_in_threads(llava, one_thread):
    plans = ["bf16", "nf4", "fp16", "recommended"] * 2
    before = state_of_process()

    def work(i):
        vk.anatomy(llava)
        model, _ = vk.load(llava, plans[i])
        return vk.audit(model, plans[i]).total

    totals = in_threads(len(plans), work)
    assert state_of_process() == before
    alone = {plan: vk.audit(vk.load(llava, plan)[0], plan).total for plan in set(plans)}
    assert totals == [alone[plan] for plan in plans]


@pytest.fixture
def weights(llava):
    """A model, and whether its weights are what they were."""
    model = vk.load(llava, "fp32", processor=False)[0]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return model, lambda: all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (1, 2, 0), (0, 2, 1)])
def test_contexts_that_end_in_any_order_restore_the_weights(weights, order):
    model, same = weights
    scopes = ["language_model", "language_model", "vision_encoder"]
    contexts = [
        vk.sensitivity.quantized(model, scope, format)
        for scope, format in zip(scopes, ["int4-row", "int3-g32", "nf4"], strict=True)
    ]
    for context in contexts:
        context.__enter__()
    for place, i in enumerate(order):
        assert not same(), f"restored after {place} of 3"
        contexts[i].__exit__()
    assert same()
    with contexts[0]:  # it can be used again
        assert not same()
    assert same()


def test_two_threads_cannot_round_one_model(weights):
    model, same = weights
    inside = threading.Barrier(3)

    def work(i):
        scope = ["language_model", "vision_encoder", "language_model"][i]
        try:
            with vk.sensitivity.quantized(model, scope, "int3-row"):
                inside.wait()  # nobody leaves before everybody has tried
        except SensitivityError:
            inside.wait()
            raise

    results = in_threads(3, work)
    assert sum(isinstance(result, SensitivityError) for result in results) == 2
    assert same()
    with vk.sensitivity.quantized(model, "projector", "int3-row"):
        assert not same()
    assert same()
