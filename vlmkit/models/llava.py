"""What pebble and cobble have in common: LLaVA-1.5 (Liu et al., 2023, arXiv 2310.03744, section 3)
around a SigLIP vision encoder and a Llama decoder. Every patch is a visual token."""


def build_config(vision, text, image_token_id, **more):
    """The LlavaConfig of a model.

    vision, text: arguments of SiglipVisionConfig and of LlamaConfig, as dictionaries. vision needs
    image_size and patch_size, in pixels. more: further arguments of LlavaConfig.
    """
    from transformers import LlamaConfig, LlavaConfig, SiglipVisionConfig

    text = LlamaConfig(**text)
    return LlavaConfig(
        vision_config=SiglipVisionConfig(**vision, vision_use_head=False),
        text_config=text,
        image_token_id=image_token_id,
        image_seq_length=(vision["image_size"] // vision["patch_size"]) ** 2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        projector_hidden_act="gelu",
        pad_token_id=text.pad_token_id,
        eos_token_id=text.eos_token_id,
        tie_word_embeddings=text.tie_word_embeddings,
        **more,
    )


def build_processor(tokenizer, *, size, patch, image, template, **more):
    """The LlavaProcessor of a model.

    size, patch: sides of a picture and of a patch, in pixels. image: the image token. template: the
    chat template. more: further arguments of the image processor.
    """
    from transformers import LlavaProcessor
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    return LlavaProcessor(
        image_processor=SiglipImageProcessorPil(size={"height": size, "width": size}, **more),
        tokenizer=tokenizer,
        patch_size=patch,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        chat_template=template,
        image_token=image,
    )
