"""The rules against labels checked by hand, for every architecture that transformers has."""

import re

import pytest
from architectures import LABELS, MODEL_TYPES, NOT_BUILT, config_of
from transformers import CONFIG_MAPPING

import vlmkit as vk
from vlmkit.anatomy import anatomy_of, on_meta
from vlmkit.architectures import OWN_RULES
from vlmkit.errors import AnatomyError

BUILT = [model_type for model_type in MODEL_TYPES if model_type not in NOT_BUILT]


def label_of(path, labels):
    """The component that the longest labelled beginning of `path` has."""
    segments = re.sub(r"(?<=\.)\d+(?=\.|$)", "#", path).split(".")
    for end in range(len(segments), 0, -1):
        label = labels.get(".".join(segments[:end]))
        if label:
            return label
    return None


@pytest.mark.parametrize("model_type", BUILT)
def test_every_parameter_and_saved_buffer_is_in_the_component_of_its_label(model_type):
    labels = LABELS[model_type]["paths"]
    model = on_meta(config_of(model_type))
    a = anatomy_of(model)
    assert not a.unknown
    saved = {*dict(model.named_parameters()), *model.state_dict()}  # both names of a tied weight
    wrong = {
        path: (a.component_of(path), label_of(path, labels))
        for path in saved
        if a.component_of(path) != label_of(path, labels)
    }
    assert not wrong
    counts = {c: a[c].parameters for c in vk.COMPONENTS if a[c].parameters}
    assert counts == LABELS[model_type]["parameters"]
    assert a.total == sum(parameter.numel() for parameter in model.parameters())


def test_the_labels_cover_the_mapping_and_nothing_else():
    assert set(LABELS) == set(BUILT)
    assert set(NOT_BUILT) <= set(MODEL_TYPES)
    assert set(OWN_RULES) <= set(MODEL_TYPES)


@pytest.mark.parametrize("model_type", NOT_BUILT)
def test_what_is_not_built_says_why(model_type):
    with pytest.raises(AnatomyError, match="not a vision-language model|cannot be built"):
        vk.anatomy(CONFIG_MAPPING[model_type]())


@pytest.mark.parametrize(
    ("model_type", "field"),
    [
        ("deepseek_ocr2", "mlp_layer_types"),
        ("diffusion_gemma", "num_experts"),
        ("granite4_vision", "deepstack_layer_map"),
    ],
)
def test_a_field_that_is_missing_is_named(model_type, field):
    with pytest.raises(AnatomyError, match=f"cannot be built.*{field}"):
        vk.anatomy(CONFIG_MAPPING[model_type]())


def test_a_field_of_no_use_and_a_field_that_is_absent_are_named():
    config = config_of("granite4_vision")
    config.downsample_rate = None
    with pytest.raises(AnatomyError, match="Look at the field downsample_rate of"):
        vk.anatomy(config)
    config = CONFIG_MAPPING["perception_lm"](vision_config={"model_type": "clip_vision_model"})
    with pytest.raises(AnatomyError, match="Look at the field model_args of"):
        vk.anatomy(config)


def test_a_config_without_eyes_is_not_a_vlm():
    with pytest.raises(AnatomyError, match="not a vision-language model.*vision_config"):
        vk.anatomy(CONFIG_MAPPING["gemma4"]())


def test_the_same_name_in_another_architecture_is_unknown():
    assert vk.architectures.decide("encoder.layer.0.weight", "pix2struct")[0] == "vision_encoder"
    assert vk.architectures.decide("encoder.block.0.weight", "udop")[0] == "language_model"
    assert vk.architectures.decide("encoder.layer.0.weight", "llava") == (None, None)
    assert vk.architectures.decide("encoder.layer.0.weight") == (None, None)
