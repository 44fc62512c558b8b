"""What `gpu.py` and `several_gpus.py` measure: checkpoints, inputs, and two ways to train."""

import platform
import subprocess
import tempfile
from datetime import date
from importlib.metadata import version
from itertools import count, pairwise

import peft
import torch
import transformers
from accelerate.utils import convert_to_fp32
from finetuning import Watch, plain_collator
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForImageTextToText, PreTrainedTokenizerFast
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import vlmkit as vk
from vlmkit.anatomy import unwrapped
from vlmkit.backend.checkpointing import enable
from vlmkit.backend.losses import IGNORED, loss_of_answers
from vlmkit.backend.passes import attending, attention_of, casting
from vlmkit.catalog import folder_of
from vlmkit.checkpoints import read_config
from vlmkit.families import family_of, image_id

# --- machine --------------------------------------------------------------------------------------


def machine(device):
    """What a run was made on, and with: its date, device and versions."""
    packages = ("torch", "transformers", "bitsandbytes", "peft", "accelerate")
    found = {"date": date.today().isoformat(), "device": "cpu", "python": platform.python_version()}
    if device != "cpu":
        properties = torch.cuda.get_device_properties(0)
        found |= {"device": properties.name, "bytes": properties.total_memory}
        found |= {"cuda": torch.version.cuda, "driver": _driver()}
    return found | {package: version(package) for package in packages}


def _driver():
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


# --- checkpoints ----------------------------------------------------------------------------------


def published(name):
    """The config of a model of the catalog. In SmolVLM's the id of the image token is beyond the
    vocabulary: the last word takes its place."""
    config = read_config(folder_of(name))
    if config.model_type == "idefics3":
        config.image_token_id = config.text_config.vocab_size - 1
    return config


def make(config, folder, device):
    """Save a model of `config` in `folder`, with random weights in bf16, in shards as published.

    The weights of its language model are half as large as usual. With the usual ones nine in ten of
    the columns of what the last layer of an MLP is given hold a number beyond 6, which LLM.int8
    takes for an outlier, for which it dequantizes a column of the weight: a prompt of one picture
    took up to twice what was predicted. In trained models few columns are such.
    """
    torch.manual_seed(0)
    config.get_text_config().initializer_range = 0.01
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="5GB")


def plain(folder, layout, device):
    """`from_pretrained` with the quantization config of the layout."""
    config = layout.quantization_config()
    more = {"quantization_config": config} if config else {}
    return AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.bfloat16, device_map={"": device}, **more
    )


# --- inputs ---------------------------------------------------------------------------------------


def inputs(model, batch):
    """Tensors of the Batch on the model's device: pictures of noise."""
    tensors = batch.inputs(torch.randn)
    return {name: tensor.to(model.device) for name, tensor in tensors.items()}


def one_token(model, prompt):
    """What comes after a prompt: a token for each sample."""
    batch, length = prompt.size, prompt.length
    tensors = {
        "input_ids": torch.ones(batch, 1, dtype=torch.long),
        "attention_mask": torch.ones(batch, length + 1, dtype=torch.long),
    }
    if family_of(model.config).three_axes(model.config):
        tensors["position_ids"] = torch.full((3, batch, 1), length)
    return {name: tensor.to(model.device) for name, tensor in tensors.items()}


# --- training -------------------------------------------------------------------------------------


def switch(model, checkpointing, hook):
    """hook: whether the embeddings' output needs a gradient, as transformers and peft arrange it by
    themselves."""
    if checkpointing:
        enable(model)  # which takes the hook off
    if hook:
        model.enable_input_require_grads()


def _backward(model, tensors):
    """As `vk.finetuning.train`: under autocast, with every token but those of pictures in the
    loss."""
    ids = tensors["input_ids"]
    labels = ids.masked_fill(ids == image_id(unwrapped(model).config), IGNORED)
    kind = ids.device.type
    attention = "eager" if kind == "cpu" else attention_of(model)
    with attending(model, attention), casting(model, False):
        with torch.autocast(kind, torch.bfloat16):
            outputs = convert_to_fp32(model(**tensors, use_cache=False))
        loss = loss_of_answers(outputs, labels)
        del outputs
        loss.backward()


def step(model, tensors):
    """A function that takes a training step."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    model.train()

    def work():
        _backward(model, tensors)
        optimizer.step()
        optimizer.zero_grad()

    return work


def gradients(model, tensors):
    """{name: gradient} of what is trained. The values that a seed draws are the same each time."""
    torch.manual_seed(0)
    model.train()
    _backward(model, tensors)
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def processor_of(config):
    """A processor of the family's own class with a tokenizer of bytes: the published ones are not
    in the catalog."""
    return {"mllama": _mllama, "qwen2_5_vl": _qwen2_5_vl}[config.model_type](config)


def _mllama(config):
    side = config.vision_config.image_size
    pictures = MllamaImageProcessorPil(
        size={"height": side, "width": side}, max_image_tiles=config.vision_config.max_num_tiles
    )
    words = _tokenizer({"<|image|>": image_id(config)})
    return transformers.MllamaProcessor(pictures, words, _template("<|image|>"))


def _qwen2_5_vl(config):
    """Without a part for videos, which transformers has with torchvision only."""

    class PicturesOnly(transformers.Qwen2_5_VLProcessor):
        def check_argument_for_proper_class(self, name, part):
            if name != "video_processor":
                super().check_argument_for_proper_class(name, part)

    ids = {
        "<|image_pad|>": config.image_token_id,
        "<|video_pad|>": config.video_token_id,
        "<|vision_start|>": config.vision_start_token_id,
        "<|vision_end|>": config.vision_end_token_id,
    }
    vision = config.vision_config
    pictures = Qwen2VLImageProcessorPil(
        patch_size=vision.patch_size,
        merge_size=vision.spatial_merge_size,
        temporal_patch_size=vision.temporal_patch_size,
    )
    template = _template("<|vision_start|><|image_pad|><|vision_end|>")
    return PicturesOnly(pictures, _tokenizer(ids), None, chat_template=template)


def _tokenizer(ids):
    """One token a byte. ids: {special token of the family: its id}."""
    specials = ["<|begin_of_text|>", "<|eot_id|>", "<|finetune_right_pad_id|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    free = (number for number in count() if number not in ids.values())
    words = dict(zip([*specials, *letters], free, strict=False)) | ids
    backend = Tokenizer(models.BPE(words, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=specials[0],
        eos_token=specials[1],
        pad_token=specials[2],
        extra_special_tokens=list(ids),
    )


def _template(image):
    return (
        "{{ bos_token }}{% for message in messages %}{{ message['role'] }}: "
        "{% for part in message['content'] %}{% if part['type'] == 'image' %}"
        + image
        + "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{{ eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )


def side_of(config):
    """Pixels of the side of a picture that becomes as many tiles as there can be; or, where there
    are no tiles, a picture of about a thousand tokens."""
    return 2 * getattr(config.vision_config, "image_size", 448)


def rows(config, number):
    """Questions about pictures of that side."""
    side = side_of(config)
    found = vk.tasks.dataset("vqa", number, split="train")
    return [row | {"images": [i.resize((side, side)) for i in row["images"]]} for row in found]


class Clock(Watch):
    """A Watch that waits until the device has come so far, and for which a peak begins with it."""

    def __enter__(self):
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        return super().__enter__()

    def mark(self, *_):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        super().mark()

    @property
    def seconds(self):
        """Of each step but the first two, in which kernels are chosen and memory is got."""
        return [b - a for (a, _), (b, _) in pairwise(self.times)][2:]


def ours(folder, plan, lora, checkpointing, device, steps):
    """`vk.finetuning.train`. Returns seconds of the steps, the mean loss, and how many parameters
    were trained."""
    model, _ = vk.load(folder, plan, processor=False, device=device)
    processor = processor_of(model.config)
    model = vk.finetuning.add_adapters(model, language_model=lora)
    with Clock(model) as clock, tempfile.TemporaryDirectory() as runs:
        run = vk.finetuning.train(
            model, processor, rows(model.config, steps), runs, max_steps=steps,
            per_device_train_batch_size=1, learning_rate=1e-4, gradient_checkpointing=checkpointing,
        )  # fmt: skip
    return clock.seconds, run.curve["loss"].mean(), _trained(model)


def usual(folder, plan, lora, checkpointing, device, steps):
    """peft and Trainer as their pages show it: 4 bits for all that transformers quantizes by
    itself, `prepare_model_for_kbit_training`, adapters on the language model, bf16 autocast."""
    quantization = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    model = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.bfloat16, device_map={"": device}, quantization_config=quantization
    )
    model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=checkpointing)
    targets = r".*language_model.*(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj"
    adapters = peft.LoraConfig(r=lora.r, lora_alpha=lora.r, target_modules=targets)
    model = peft.get_peft_model(model, adapters)
    processor = processor_of(model.config)
    with Clock(model) as clock, tempfile.TemporaryDirectory() as runs:
        arguments = transformers.TrainingArguments(
            runs, max_steps=steps, per_device_train_batch_size=1, learning_rate=1e-4, bf16=True,
            save_strategy="no", report_to="none", remove_unused_columns=False, disable_tqdm=True,
            gradient_checkpointing=checkpointing, use_cpu=device == "cpu",
        )  # fmt: skip
        trainer = transformers.Trainer(
            model, arguments, plain_collator(processor), train_dataset=rows(model.config, steps)
        )
        trainer.remove_callback(transformers.PrinterCallback)
        done = trainer.train()
    return clock.seconds, done.training_loss, _trained(model)


def _trained(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
