"""Real processors for the tiny checkpoints of families.py, small enough for their vocabulary.

    processor = PROCESSORS["mllama"]()      # of the class that transformers has for that family

Each has a tokenizer of one token a character of ASCII, the family's own special tokens at the ids
that the tiny configs know, and an image processor that makes pictures of SIDE × SIDE pixels.
Several families' processors hold a video processor too, and all of those are written with
torchvision, which is no requirement of vlmkit: here they are transformers' own without that part.
"""

import importlib

import transformers
from families import END, IMAGE, SIDE, START, VIDEO, VOCABULARY
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics2.image_processing_pil_idefics2 import Idefics2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

SQUARE = {"height": SIDE, "width": SIDE}
GRID = {  # 4 × 4 patches of 4 pixels, which the merger makes 2 × 2
    "patch_size": 4,
    "merge_size": 2,
    "temporal_patch_size": 2,
    "size": {"shortest_edge": 16**2, "longest_edge": 16**2},
}
ASCII = [chr(code) for code in range(32, 127)]


def tokenizer(image="<image>", video="<video>", start="<start>", end="<end>", extra=(), **named):
    """One token a character, and special tokens at the ids of families.py. named: what a processor
    asks its tokenizer for, such as boi_token."""
    words = {token: number for number, token in enumerate(("<pad>", "<bos>", "<eos>", "<unk>"))}
    words |= {image: IMAGE, video: VIDEO, start: START, end: END}
    free = (number for number in range(9, VOCABULARY))
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    letters = [letters.pre_tokenize_str(letter)[0][0] for letter in [*ASCII, "\n"]]
    words |= {word: next(free) for word in (*extra, *letters)}
    backend = Tokenizer(models.BPE(words, [], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        extra_special_tokens=[image, video, start, end, *extra],
        model_specific_special_tokens=named,
        model_max_length=256,
    )


def template(image):
    """A chat template with `image` where a picture is."""
    return (
        "{{ bos_token }}{% for message in messages %}{{ message['role'] }}: "
        "{% for part in message['content'] %}{% if part['type'] == 'image' %}"
        + image
        + "{% else %}"
        "{{ part['text'] }}{% endif %}{% endfor %}{{ eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )


def _without_video(family, kind, *parts, **settings):
    """A processor of transformers whose video processor, which needs torchvision, is None."""
    module = importlib.import_module(f"transformers.models.{family}.processing_{family}")

    def check(self, name, part):
        if name != "video_processor":
            super(pictures_only, self).check_argument_for_proper_class(name, part)

    def save(self, folder, **more):  # transformers' own would ask the video processor too
        self.tokenizer.save_pretrained(folder)
        self.image_processor.save_pretrained(folder)

    own = getattr(module, kind)
    methods = {"check_argument_for_proper_class": check, "save_pretrained": save}
    pictures_only = type(kind, (own,), methods)
    return pictures_only(*parts, **settings)


def _llava():
    return transformers.LlavaProcessor(
        CLIPImageProcessorPil(size=SQUARE, crop_size=SQUARE), tokenizer(), patch_size=12,
        vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=template("<image>"),
    )  # fmt: skip


def _llava_next():
    pictures = LlavaNextImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size=SQUARE, image_grid_pinpoints=[[SIDE, SIDE]]
    )
    return transformers.LlavaNextProcessor(
        pictures, tokenizer(), patch_size=12, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=template("<image>"),
    )  # fmt: skip


def _llava_onevision():
    pictures = LlavaOnevisionImageProcessorPil(size=SQUARE, image_grid_pinpoints=[[SIDE, SIDE]])
    return _without_video(
        "llava_onevision", "LlavaOnevisionProcessor", pictures, tokenizer(), None,
        num_image_tokens=4, vision_feature_select_strategy="full",
        chat_template=template("<image>"),
    )  # fmt: skip


def _grid(family, kind, pictures=Qwen2VLImageProcessorPil, image="<|image_pad|>"):
    video = image.replace("image", "video")
    words = tokenizer(image, video, "<|vision_start|>", "<|vision_end|>")
    return _without_video(
        family, kind, pictures(**GRID), words, None,
        chat_template=template(f"<|vision_start|>{image}<|vision_end|>"),
    )  # fmt: skip


def _qwen2_vl():
    return _grid("qwen2_vl", "Qwen2VLProcessor")


def _qwen2_5_vl():
    return _grid("qwen2_5_vl", "Qwen2_5_VLProcessor")


def _qwen3_vl():
    return _grid("qwen3_vl", "Qwen3VLProcessor")


def _glm4v():
    return _grid("glm4v", "Glm4vProcessor", Glm4vImageProcessorPil, "<|image|>")


def _mllama():
    words = tokenizer("<|image|>", extra=["<|python_tag|>"])
    return transformers.MllamaProcessor(
        MllamaImageProcessorPil(size=SQUARE, max_image_tiles=4), words, template("<|image|>")
    )


def _idefics2():
    words = tokenizer(extra=["<fake_token_around_image>", "<end_of_utterance>"])
    pictures = Idefics2ImageProcessorPil(
        size={"shortest_edge": SIDE, "longest_edge": SIDE}, do_image_splitting=False
    )
    return transformers.Idefics2Processor(
        pictures, words, image_seq_len=3, chat_template=template("<image>")
    )


_SPLIT = ["<fake_token_around_image>", "<end_of_utterance>", "<global-img>"]


def _idefics3():
    pictures = Idefics3ImageProcessorPil(
        size={"longest_edge": SIDE}, max_image_size={"longest_edge": SIDE}, do_image_splitting=False
    )
    words = tokenizer(extra=_SPLIT)
    return transformers.Idefics3Processor(
        pictures, words, image_seq_len=4, chat_template=template("<image>")
    )


def _paligemma():
    pictures = SiglipImageProcessorPil(size=SQUARE)
    pictures.image_seq_length = 4
    return transformers.PaliGemmaProcessor(pictures, tokenizer(image_token="<image>"))


def _gemma3():
    words = tokenizer(
        "<soft>", "<video>", "<boi>", "<eoi>",
        image_token="<soft>", boi_token="<boi>", eoi_token="<eoi>",
    )  # fmt: skip
    return transformers.Gemma3Processor(
        Gemma3ImageProcessorPil(size=SQUARE, do_pan_and_scan=False), words,
        template("<boi>"), image_seq_length=4,
    )  # fmt: skip


def _internvl():
    words = tokenizer(
        "<ctx>", start_image_token="<start>", end_image_token="<end>",
        context_image_token="<ctx>", video_token="<video>",
    )  # fmt: skip
    pictures = GotOcr2ImageProcessorPil(size=SQUARE, crop_to_patches=False)
    return _without_video(
        "internvl",
        "InternVLProcessor",
        pictures,
        words,
        None,
        image_seq_length=4,
        chat_template=template("<ctx>"),
    )


def _blip2():
    return transformers.Blip2Processor(
        BlipImageProcessorPil(size=SQUARE), tokenizer(), num_query_tokens=3
    )


PROCESSORS = {
    "llava": _llava,
    "llava_next": _llava_next,
    "llava_onevision": _llava_onevision,
    "qwen2_vl": _qwen2_vl,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
    "qwen3_vl_moe": _qwen3_vl,
    "mllama": _mllama,
    "idefics2": _idefics2,
    "idefics3": _idefics3,
    "paligemma": _paligemma,
    "gemma3": _gemma3,
    "internvl": _internvl,
    "blip2": _blip2,
    "glm4v": _glm4v,
}
"""Family -> a function that makes its processor."""
