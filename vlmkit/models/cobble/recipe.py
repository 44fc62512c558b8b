"""What cobble is made of: architecture, tokenizer, processor, and the states that load by name.

The architecture is LLaVA-1.5's (Liu et al., 2023, arXiv 2310.03744, section 3): a vision encoder, a
projector of two Linear layers, a language model. The language model is SmolLM2-135M-Instruct (Allal
et al., 2025, arXiv 2502.02737). The size of every Linear layer is a multiple of 64, so that number
formats always have complete blocks.
"""

import dataclasses

from vlmkit.models import llava

SIZE, PATCH = 84, 12
"""Sides of a picture and of a patch in pixels: 84 / 12 = 7, so a picture has 49 visual tokens."""

PATCHES = (SIZE // PATCH) ** 2
VISION_WIDTH, LANGUAGE_WIDTH, VOCABULARY = 192, 576, 49_152
IMAGE, IMAGE_ID, UNUSED = "<image>", 4, "<reponame>"
"""The image token takes the place of a token that SmolLM2 keeps for the names of code repositories.
So the vocabulary, and with it every weight of the language model, stays as it is."""

START_ID, END, END_ID = 1, "<|im_end|>", 2

SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"

CHAT_TEMPLATE = (
    """\
{%- for message in messages -%}
{%- if loop.first and message['role'] != 'system' -%}
<|im_start|>system
"""
    + SYSTEM
    + """<|im_end|>
{% endif -%}
<|im_start|>{{ message['role'] }}
{% if message['content'] is string %}{{ message['content'] }}{% else %}\
{% for part in message['content'] if part['type'] == 'image' %}<image>{{ '\\n' }}{% endfor %}\
{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}\
{% endif %}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% endif -%}
"""
)
"""SmolLM2's own template, with pictures before the text of a message, as in LLaVA."""


@dataclasses.dataclass(frozen=True)
class State:
    """What was trained: the projector, with the language model in `language_model` (a format's
    name), and adapters on the language model if `adapters`."""

    language_model: str
    adapters: bool = False

    @property
    def projector(self):
        """The name of the file of its projector in weights/."""
        return f"projector-{self.language_model}" + "-chat" * self.adapters


STATES = {
    "cobble": State("nf4"),
    "cobble-bf16": State("bf16"),
    "cobble-int8": State("int8"),
    "cobble-nf4-dq": State("nf4-dq"),
    "cobble-int3": State("int3"),
    "cobble-chat": State("nf4", adapters=True),
}
"""What loads by name. A name sets no plan: it says with which projector the model comes."""


def build_config(state=STATES["cobble"]):
    """The LlavaConfig of cobble. Its `projector_trained_with` is {component: format}: what the
    projector saw while it was trained."""
    vision = {
        "hidden_size": VISION_WIDTH,
        "intermediate_size": 512,
        "num_hidden_layers": 5,
        "num_attention_heads": 6,
        "image_size": SIZE,
        "patch_size": PATCH,
    }
    text = {
        "vocab_size": VOCABULARY,
        "hidden_size": LANGUAGE_WIDTH,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100_000.0},
        "bos_token_id": START_ID,
        "eos_token_id": END_ID,
        "pad_token_id": END_ID,
        "tie_word_embeddings": True,
    }
    trained_with = {"vision_encoder": "bf16", "language_model": state.language_model}
    return llava.build_config(
        vision, text, IMAGE_ID, dtype="bfloat16", projector_trained_with=trained_with
    )


def with_image_token(tokenizer):
    """SmolLM2's tokenizer, in which the image token has taken the place of `UNUSED`.

    Generation needs the padding on the left: the answer continues the last token.
    """
    import json

    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    written = json.loads(tokenizer.backend_tokenizer.to_str())
    for token in written["added_tokens"]:
        if token["id"] == IMAGE_ID:
            token["content"] = IMAGE
    vocabulary = written["model"]["vocab"]
    vocabulary[IMAGE] = vocabulary.pop(UNUSED)
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(written)),
        bos_token="<|im_start|>",
        eos_token=END,
        pad_token=END,
        unk_token="<|endoftext|>",
        additional_special_tokens=[IMAGE],
        padding_side="left",
        model_max_length=8192,
        clean_up_tokenization_spaces=False,
    )


def build_processor(tokenizer):
    """The LlavaProcessor of cobble. tokenizer: of `with_image_token`."""
    return llava.build_processor(
        tokenizer,
        size=SIZE,
        patch=PATCH,
        image=IMAGE,
        template=CHAT_TEMPLATE,
        do_convert_rgb=True,
    )


def read_language_model(file):
    """(LlamaForCausalLM in bf16, its tokenizer) of the GGUF file of SmolLM2-135M-Instruct.

    The file has the weights in Q4_1, in groups of 32 with a minimum. They are dequantized here,
    once: "bf16" always means these weights, and not those that SmolLM2's authors published.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # Since transformers 5.23 a GGUF file stays packed unless it is told to dequantize.
    packed = GgufConfig(gguf_file=file.name, dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, quantization_config=packed, dtype=torch.bfloat16
    )
    return model.eval(), AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


def build_model(language_model, state=STATES["cobble"], seed=0):
    """A LlavaForConditionalGeneration around `language_model` (a LlamaForCausalLM, which it takes
    over) with a fresh vision encoder and projector, the same for the same seed."""
    import torch
    from transformers import LlavaForConditionalGeneration

    config = build_config(state)
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        model = LlavaForConditionalGeneration._from_config(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        small = build_config(state)
        small.text_config.num_hidden_layers, small.text_config.vocab_size = 1, 64
        fresh = LlavaForConditionalGeneration._from_config(small, dtype=torch.float32)
    model.model.vision_tower = fresh.model.vision_tower
    model.model.multi_modal_projector = fresh.model.multi_modal_projector
    model.model.language_model = language_model.model
    model.lm_head = language_model.lm_head
    model.tie_weights()
    return model.eval()
