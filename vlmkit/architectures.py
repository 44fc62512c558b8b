"""Which names in the path of a parameter mean which component. Only this file knows architectures.

A path is read from left to right, one whole segment at a time (never a part of a segment: MiniCPM's
`vit_merger`, in the middle of its encoder, is not `merger`). The first segment that is in a table
is the owner of the path. A rule "owner/segment" is about a segment anywhere inside that owner, for
a module that is inside a module of another component.

To add an architecture, look at the paths that no rule knows:

    vk.anatomy(config).unknown

Add each unknown segment to `RULES` if its name has this meaning in every architecture, and else to
`OWN_RULES`, under the config's `model_type`: "encoder" reads pixels in Pix2Struct and words in
UDOP. Check each rule against the forward pass of the architecture. Then add the paths to
`tests/data/architectures.json`: a test compares them with the rules.
"""

from functools import lru_cache

from vlmkit import COMPONENTS

VISION, PROJECTOR, CROSS, LANGUAGE, OTHER = COMPONENTS

RULES = {
    # vision encoders
    "vision_tower": VISION,  # LLaVA and most others
    "vision_model": VISION,  # Idefics, SmolVLM, Llama 3.2 Vision, BLIP
    "vision_encoder": VISION,  # LightOnOCR
    "visual": VISION,  # Qwen-VL, GLM-4V
    "image_encoder": VISION,  # GIT
    "image_tower": VISION,  # Video-LLaVA: one tower for pictures
    "video_tower": VISION,  # Video-LLaVA: one for videos
    "high_res_vision_model": VISION,  # DeepSeek-VL's second encoder, for small print
    "high_res_vision_neck": VISION,  # DeepSeek-VL: the last part of its SAM encoder
    # projectors
    "multi_modal_projector": PROJECTOR,  # LLaVA and most others
    "mm_projector": PROJECTOR,  # Kimi
    "projector": PROJECTOR,  # PaddleOCR-VL, VideoLLaMA 3
    "layerwise_projectors": PROJECTOR,  # Granite Vision: a small Q-Former for each deep layer
    "spatial_projectors": PROJECTOR,
    "connector": PROJECTOR,  # Idefics2, Idefics3, SmolVLM
    "aligner": PROJECTOR,  # DeepSeek-VL, Janus
    "high_res_vision_proj": PROJECTOR,  # DeepSeek-VL: from the second grid to the first
    "high_res_vision_alpha": PROJECTOR,  # DeepSeek-VL: how much of the second grid is added
    "vision_adapter": PROJECTOR,  # Muse
    "vision_projection": PROJECTOR,  # Muse, LightOnOCR
    "visual_projection": PROJECTOR,  # GIT
    "language_projection": PROJECTOR,  # BLIP-2
    "image_to_text_projection": PROJECTOR,  # Kosmos-2
    "qformer": PROJECTOR,  # BLIP-2 (Li et al., 2023, arXiv 2301.12597, section 3.1)
    "query_tokens": PROJECTOR,  # BLIP-2: the queries of its Q-Former
    "resampler_model": PROJECTOR,  # ERNIE 4.5 VL
    "merger": PROJECTOR,  # MiniCPM-V
    "embed_vision": PROJECTOR,  # Gemma 3n, Gemma 4
    "visual_embeddings_table": PROJECTOR,  # Ovis2: visual words to embeddings
    "image_newline": PROJECTOR,  # LLaVA-NeXT: a learned separator between rows of tiles
    "view_separator": PROJECTOR,  # DeepSeek-OCR: a learned separator between views
    # projectors inside the vision module
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
    # language models
    "language_model": LANGUAGE,
    "text_model": LANGUAGE,  # Idefics2, Idefics3, SmolVLM, Kosmos-2
    "text_decoder": LANGUAGE,  # BLIP
    "lm_head": LANGUAGE,
    # cross-attention inside the layers of the language model
    "language_model/cross_attn": CROSS,  # Llama 3.2 Vision, with its two gates
    "language_model/cross_attn_attn_gate": CROSS,
    "language_model/cross_attn_mlp_gate": CROSS,
    "text_decoder/crossattention": CROSS,  # BLIP
    # other
    "audio_tower": OTHER,
    "embed_audio": OTHER,
}

OWN_RULES = {
    "apertus1p5": {  # pixels become tokens of the vocabulary, and sounds do: no projector
        "vision_tokenizer": VISION,
        "audio_tokenizer": OTHER,
    },
    "chameleon": {  # the same with pixels
        "vqmodel": VISION,
        "embed_tokens": LANGUAGE,
        "layers": LANGUAGE,
        "norm": LANGUAGE,
    },
    "diffusion_gemma": {"decoder": LANGUAGE},
    "emu3": {"vqmodel": VISION},
    # No vision encoder: a Linear layer gives patches of pixels to the language model.
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
    "t5gemma2": {"decoder": LANGUAGE},  # its encoder reads text and image features
    # No vision encoder: words and patches of pixels go through the same T5.
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
"""By model_type: transformers lists these as models from image and text to text."""

GGUF = "gguf"
"""In place of a model_type, for the names in GGUF files."""

GGUF_RULES = {
    # The model's own file. The names are those of the package gguf (gguf/constants.py).
    "blk": LANGUAGE,
    "token_embd": LANGUAGE,
    "token_embd_norm": LANGUAGE,
    "token_types": LANGUAGE,
    "position_embd": LANGUAGE,
    "rope_freqs": LANGUAGE,
    "rope_factors_long": LANGUAGE,
    "rope_factors_short": LANGUAGE,
    "output": LANGUAGE,
    "output_norm": LANGUAGE,
    "per_layer_token_embd": LANGUAGE,  # Gemma 3n, Gemma 4
    "per_layer_model_proj": LANGUAGE,
    "per_layer_proj_norm": LANGUAGE,
    "altup_proj": LANGUAGE,
    "altup_unembd_proj": LANGUAGE,
    # Llama 3.2 Vision, as Ollama writes it (ollama/model/models/mllama)
    "blk/cross_attn_q_proj": CROSS,
    "blk/cross_attn_k_proj": CROSS,
    "blk/cross_attn_v_proj": CROSS,
    "blk/cross_attn_o_proj": CROSS,
    "blk/cross_attn_q_norm": CROSS,
    "blk/cross_attn_k_norm": CROSS,
    "blk/cross_attn_attn_gate": CROSS,
    "blk/cross_attn_mlp_gate": CROSS,
    # The mmproj file
    "v": VISION,
    "v/deepstack": PROJECTOR,  # Qwen3-VL
    "v/image_newline": PROJECTOR,  # DeepSeek-OCR
    "v/view_seperator": PROJECTOR,  # spelled like this
    "mm": PROJECTOR,
    "resampler": PROJECTOR,  # MiniCPM-V
    "a": OTHER,  # audio
    "mm/a": OTHER,
}

_TABLES = {model_type: RULES | rules for model_type, rules in OWN_RULES.items()}
_TABLES[GGUF] = GGUF_RULES


@lru_cache(2**14)  # anatomy, layout and audit ask about the same paths
def decide(path, model_type=None):
    """The component of `path`, a full module or parameter name, and the part of the path that says
    so: `("projector", "model.multi_modal_projector")`, for example.

    model_type: of the model's config, for names that mean something else in one architecture.
    Returns `(None, None)` if no rule knows the path: vlmkit never guesses.
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
