"""What pebble is made of: architecture, tokenizer, processor.

The architecture is LLaVA-1.5's (Liu et al., 2023, arXiv 2310.03744, section 3): a vision encoder, a
projector of two Linear layers, a Llama decoder. The size of every Linear layer is a multiple of 64,
so that number formats always have complete blocks.
"""

from vlmkit import tasks
from vlmkit.models import llava

PATCH = 12
"""The side of a patch in pixels: 84 / 12 = 7, so a picture has 49 visual tokens."""

PATCHES = (tasks.SIZE // PATCH) ** 2

PAD, IMAGE, USER, ASSISTANT, END = "<|pad|>", "<image>", "<|user|>", "<|assistant|>", "<|end|>"
SPECIAL_TOKENS = (PAD, IMAGE, USER, ASSISTANT, END)
VOCABULARY = 576

CONTEXT = 1024
"""Tokens that the decoder has room for: twenty pictures and a question."""

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
<|assistant|> {% if message['content'] is string %}{{ message['content'] }}{% else %}\
{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}\
{% endif %}<|end|>
{%- else -%}
<|user|>{% if message['content'] is string %}{{ message['content'] }}{% else %}\
{% for part in message['content'] if part['type'] == 'image' %}<image>{{ '\\n' }}{% endfor %}\
{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}\
{% endif %}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}
"""


def build_tokenizer():
    """A byte-level BPE (Sennrich et al., 2016, arXiv 1508.07909) trained on the tasks' own text.

    It tokenizes any string. It was not trained on printed text, so it always splits the text of a
    sign into letters. It is the same each time, because the recipes of the text are seeded.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    def text():
        for task, recipe in tasks.RECIPES.items():
            for index in range(1500):
                for kind in recipe.kinds:
                    rng = tasks.generator("tokenizer", task, kind, index)
                    picture, question, answer = recipe.example(kind, rng)
                    yield question
                    if task != "ocr":
                        yield f" {answer}"
                        yield recipe.describe(picture.facts)

    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    model.decoder = decoders.ByteLevel()
    model.train_from_iterator(
        text(),
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=model,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[IMAGE, USER, ASSISTANT],
        padding_side="left",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def build_processor(tokenizer):
    return llava.build_processor(
        tokenizer, size=tasks.SIZE, patch=PATCH, image=IMAGE, template=CHAT_TEMPLATE
    )


def build_config(tokenizer):
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    vision = {
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": tasks.SIZE,
        "patch_size": PATCH,
    }
    text = {
        "vocab_size": VOCABULARY,
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "num_key_value_heads": 6,
        "max_position_embeddings": CONTEXT,
        "bos_token_id": None,
        "eos_token_id": ids[END],
        "pad_token_id": ids[PAD],
        "tie_word_embeddings": False,
    }
    return llava.build_config(vision, text, ids[IMAGE])


def build_model(config, seed=0):
    """Fresh weights in float32, the same for the same seed."""
    import torch
    from transformers import LlavaForConditionalGeneration

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # At this size the backward pass of eager attention is much faster on a CPU than the fused.
        return LlavaForConditionalGeneration._from_config(config, attn_implementation="eager")
