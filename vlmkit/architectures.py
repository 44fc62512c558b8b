"""Which names in a parameter's path mean which component: the only place that knows architectures.

A path is read from left to right, a whole segment at a time (never a substring: MiniCPM's
`vit_merger`, in the middle of its encoder, is not `merger`). The first segment that a table knows
owns the path. "owner/segment" is a rule for a segment anywhere inside that owner, for what sits
inside a module of another component.

To add an architecture, print its paths and see what is unknown:

    vk.anatomy(config).unknown

Name each unknown segment in `RULES` if the name says what it is wherever it stands, or in
`OWN_RULES` under the config's `model_type` if it means something in that architecture alone
("encoder" is the pixels' side of Pix2Struct and the words' side of UDOP). Then check each
against the architecture's forward pass, and put its paths into `tests/data/architectures.json`: the
test compares them with what the rules say.
"""

from functools import lru_cache

from vlmkit import COMPONENTS

VISION, PROJECTOR, CROSS, LANGUAGE, OTHER = COMPONENTS

RULES = {
    # the pixels' side
    "vision_tower": VISION,  # LLaVA and most others
    "vision_model": VISION,  # Idefics, SmolVLM, Llama 3.2 Vision, BLIP
    "vision_encoder": VISION,  # LightOnOCR
    "visual": VISION,  # Qwen-VL, GLM-4V
    "image_encoder": VISION,  # GIT
    "image_tower": VISION,  # Video-LLaVA, one tower for pictures
    "video_tower": VISION,  # and one for videos
    "high_res_vision_model": VISION,  # DeepSeek-VL's second encoder, for fine print
    "high_res_vision_neck": VISION,  # and the neck that its SAM encoder ends with
    # between the two
    "multi_modal_projector": PROJECTOR,  # LLaVA and most others
    "mm_projector": PROJECTOR,  # Kimi
    "projector": PROJECTOR,  # PaddleOCR-VL, VideoLLaMA 3
    "layerwise_projectors": PROJECTOR,  # Granite Vision: a small Q-Former for each deep layer
    "spatial_projectors": PROJECTOR,
    "connector": PROJECTOR,  # Idefics2, Idefics3, SmolVLM
    "aligner": PROJECTOR,  # DeepSeek-VL, Janus
    "high_res_vision_proj": PROJECTOR,  # DeepSeek-VL: the second grid to the first's
    "high_res_vision_alpha": PROJECTOR,  # and says how much of it is added
    "vision_adapter": PROJECTOR,  # Muse
    "vision_projection": PROJECTOR,  # Muse, LightOnOCR
    "visual_projection": PROJECTOR,  # GIT
    "language_projection": PROJECTOR,  # BLIP-2
    "image_to_text_projection": PROJECTOR,  # Kosmos-2
    "qformer": PROJECTOR,  # BLIP-2 (Li et al., 2023, arXiv 2301.12597, section 3.1)
    "query_tokens": PROJECTOR,  # and what its Q-Former asks with
    "resampler_model": PROJECTOR,  # ERNIE 4.5 VL
    "merger": PROJECTOR,  # MiniCPM-V
    "embed_vision": PROJECTOR,  # Gemma 3n, Gemma 4
    "visual_embeddings_table": PROJECTOR,  # Ovis2: visual words to embeddings
    "image_newline": PROJECTOR,  # LLaVA-NeXT: a learned separator between rows of tiles
    "view_separator": PROJECTOR,  # DeepSeek-OCR: the same between views
    # a connector inside the vision module
    "vision_tower/head_linear": PROJECTOR,  # Ovis2: features to visual words
    "vision_tower/head_norm": PROJECTOR,
    "vision_tower/merger": PROJECTOR,  # dots, Inkling
    "vision_tower/patch_merger": PROJECTOR,  # HunYuan-VL
    "vision_model/connector": PROJECTOR,  # Granite-Docling
    "vision_model/downsampler1": PROJECTOR,  # Step
    "vision_model/downsampler2": PROJECTOR,
    "vision_model/merger": PROJECTOR,  # HyperCLOVA X
    "vision_model/vision_adapter": PROJECTOR,  # Llama 4: pixel shuffle and MLP before the projector
    "visual/merger": PROJECTOR,  # Qwen-VL, GLM-4V
    "visual/merger_list": PROJECTOR,  # Qwen3-Omni: one more for each deep feature
    "visual/deepstack_merger_list": PROJECTOR,  # Qwen3-VL: the same
    "visual/downsample": PROJECTOR,  # GLM-4V: the convolution before the merger
    # the words' side
    "language_model": LANGUAGE,
    "text_model": LANGUAGE,  # Idefics2, Idefics3, SmolVLM, Kosmos-2
    "text_decoder": LANGUAGE,  # BLIP
    "lm_head": LANGUAGE,
    # attention to the image inside the decoder's layers
    "language_model/cross_attn": CROSS,  # Llama 3.2 Vision, with its two gates
    "language_model/cross_attn_attn_gate": CROSS,
    "language_model/cross_attn_mlp_gate": CROSS,
    "text_decoder/crossattention": CROSS,  # BLIP
    # neither
    "audio_tower": OTHER,
    "embed_audio": OTHER,
}

OWN_RULES = {
    "chameleon": {  # pixels become discrete tokens of the vocabulary: no projector
        "vqmodel": VISION,
        "embed_tokens": LANGUAGE,
        "layers": LANGUAGE,
        "norm": LANGUAGE,
    },
    "diffusion_gemma": {"decoder": LANGUAGE},
    "emu3": {"vqmodel": VISION},
    # No encoder: a Linear layer takes patches of pixels straight to the language model.
    "fuyu": {"vision_embed_tokens": PROJECTOR},
    "git": {
        "embeddings": LANGUAGE,
        "encoder": LANGUAGE,
        "output": LANGUAGE,
        "img_temperal_embedding": PROJECTOR,
    },
    "idefics": {
        "embed_tokens": LANGUAGE,
        "layers": LANGUAGE,
        "norm": LANGUAGE,
        "gated_cross_attn_layers": CROSS,  # whole layers (Alayrac et al., 2022, arXiv 2204.14198)
        "perceiver_resampler": PROJECTOR,
    },
    "janus": {  # the half that draws pictures
        "vqmodel": OTHER,
        "generation_embeddings": OTHER,
        "generation_aligner": OTHER,
        "generation_head": OTHER,
    },
    "pi0": {  # the half that moves a robot
        "dit": OTHER,
        "embed_action_time": OTHER,
        "action_out_proj": OTHER,
    },
    "pix2struct": {
        "encoder": VISION,
        "decoder": LANGUAGE,
        "decoder/encoder_decoder_attention": CROSS,
    },
    "pp_formulanet": {
        "encoder": VISION,
        "encoder/multi_modal_projector": PROJECTOR,
        "decoder": LANGUAGE,
        "decoder/encoder_attn": CROSS,
        "decoder/encoder_attn_layer_norm": CROSS,
    },
    "t5gemma2": {"decoder": LANGUAGE},  # its encoder reads text and image features alike
    # No encoder: words and patches of pixels go through the same T5.
    "udop": {
        "shared": LANGUAGE,
        "patch_embed": PROJECTOR,
        "encoder": LANGUAGE,
        "encoder/embed_patches": PROJECTOR,
        "decoder": LANGUAGE,
        "decoder/embed_patches": PROJECTOR,
    },
    "vision-encoder-decoder": {
        "encoder": VISION,
        "enc_to_dec_proj": PROJECTOR,
        "decoder": LANGUAGE,
        "decoder/crossattention": CROSS,
    },
}

NOT_VLMS = {"evolla": "reads proteins", "mistral4": "reads text alone"}
"""Listed by transformers among the models from image and text to text, by model_type."""

_TABLES = {model_type: RULES | rules for model_type, rules in OWN_RULES.items()}


@lru_cache(2**14)  # anatomy, layout and audit ask for the same paths
def decide(path, model_type=None):
    """Component of `path`, a full module or parameter name, and the part of it that decided.

    model_type: of the model's config, for the names that mean something in one architecture alone.
    Returns `("projector", "model.multi_modal_projector")`, for example, and `(None, None)` where no
    rule knows the path: what is unknown is never guessed.
    """
    rules = _TABLES.get(model_type, RULES)
    segments = path.split(".")
    owner = place = None
    for i, segment in enumerate(segments, start=1):
        if owner is None:
            if segment in rules:
                owner, place = segment, ".".join(segments[:i])
        elif f"{owner}/{segment}" in rules:
            return rules[f"{owner}/{segment}"], ".".join(segments[:i])
    return rules.get(owner), place
