"""Rules: each looks at a case for one kind of mistake, and yields what it finds."""

from vlmkit import COMPONENTS
from vlmkit.formats import BLOCK, format_of_dtype
from vlmkit.linting.case import listed, size_of, titled
from vlmkit.linting.configs import SKIP
from vlmkit.linting.fates import why_unusable
from vlmkit.linting.findings import ERROR, MEGABYTE, NOTE, WARNING, Finding
from vlmkit.linting.patterns import patterns
from vlmkit.rows import EXPERTS, HEAD, LINEAR

LANGUAGE_MODEL = "language_model"

# --- what makes the load fail, or do something else than what the config says --------------------


def overruled(case):
    """A config given for a checkpoint that is quantized already."""
    if case.overruled is not None:
        yield Finding(
            ERROR,
            "overruled",
            f"The checkpoint is quantized already, and transformers uses the config inside it "
            f"({case.given}). The one given ({case.overruled}) is not looked at, and what follows "
            "is about the other.",
            "Leave the config out, or load the checkpoint that this one was made from under it.",
        )


def unknown_keys(case):
    """Keys that BitsAndBytesConfig does not have, and drops without a word."""
    for key, near in case.given.ignored.items():
        yield Finding(
            ERROR if near else WARNING,
            "unknown-key",
            f"{key!r} is no field of BitsAndBytesConfig, which drops it without a word.",
            f"Write {near!r}." if near else "Leave it out, or look for the field that was meant.",
        )


def unusable_patterns(case):
    """Entries on which `from_pretrained` fails."""
    for pattern in case.given.patterns or []:
        why = why_unusable(pattern)
        if why:
            yield Finding(
                ERROR,
                "unusable-pattern",
                f"{pattern!r} is {why}: loading fails with it. What follows is as if it were "
                "not there.",
                f"Write a full module name, such as {case.starts[0]!r}.",
            )


def no_format(case):
    """Neither 4 nor 8 bits: transformers converts all the same."""
    config = case.given.config
    if not (config.load_in_4bit or config.load_in_8bit):
        yield Finding(
            ERROR,
            "no-format",
            "The config asks for neither 4 nor 8 bits, and transformers converts to "
            f"{case.given.format} all the same.",
            "Write load_in_4bit=True or load_in_8bit=True, or load without a config.",
        )


def nothing_quantized(case):
    """A config after which everything is as it was."""
    if any(fate.quantized for fate in case.layers):
        return
    if case.given.config.llm_int8_has_fp16_weight:
        why = "llm_int8_has_fp16_weight=True keeps the weights of int8 layers in 16 bits"
        remedy = "Leave it out: it is for training the weights themselves."
    else:
        all_of_them = [p for p in case.patterns if all(p in f.kept_by for f in case.layers)]
        why = "the skip list keeps every Linear layer"
        if all_of_them:
            why += f", {all_of_them[0]!r} alone does"
        if "" in all_of_them:
            why += " (every name ends with the empty string)"
        remedy = "Name the modules to keep in full, or load without a config."
    yield case.finding(ERROR, "nothing-quantized", f"Nothing is quantized: {why}.", remedy,
                       case.layers)  # fmt: skip


def stored_otherwise(case):
    """Weights that the checkpoint holds in another format than its own config has them read in."""
    wrong = [
        fate
        for fate in case.layers
        if case.stored.get(fate.name, fate.format) != fate.format
        and (fate.quantized or case.stored[fate.name] == case.given.format)
    ]
    if wrong:
        one = wrong[0]
        yield case.finding(
            ERROR,
            "stored-otherwise",
            f"{len(wrong)} weights are stored in another format than the config has them read in, "
            f"such as {one.module}: stored in {case.stored[one.name]}, read as {one.format}. Names "
            "of modules change with transformers' releases, and the list that the checkpoint was "
            "saved with may be of another one. The load or the first forward pass fails.",
            "Load it with vk.load(…), which reads what is stored, and save it again with vk.save.",
            wrong,
        )


# --- the head ------------------------------------------------------------------------------------


def tied_weights(case):
    """A layer that shares the embeddings' weight, made a quantized one."""
    lost = [fate for fate in case.layers if fate.tied and fate.quantized]
    if lost:
        names = [fate.module for fate in lost]
        yield case.finding(
            ERROR,
            "tied-weight",
            f"{listed(names)} shares its weight with the embeddings and becomes a quantized layer. "
            "The model loads, and its first forward pass fails. transformers leaves it out by "
            f"itself, but any {SKIP}, even an empty one, replaces that.",
            f"Add {listed(names)} to {SKIP}. A vk.Plan leaves it out by itself.",
            lost,
            lost[0].component,
        )


def quantized_head(case):
    """The output head quantized, which transformers does not do by itself."""
    heads = [fate for fate in case.layers if fate.kind == HEAD and fate.quantized and not fate.tied]
    if heads and case.given.patterns is not None:
        names = [fate.module for fate in heads]
        yield case.finding(
            WARNING,
            "head-quantized",
            f"The output head {listed(names)} is quantized ({size_of(heads)}). transformers leaves "
            f"it out by itself, but any {SKIP}, even an empty one, replaces that.",
            f"Add {listed(names)} to {SKIP}. A vk.Plan leaves it out unless it is named.",
            heads,
            heads[0].component,
        )


# --- what is quantized, and what is not ----------------------------------------------------------


def quantized_components(case):
    """Components whose quantization is seldom meant: all but the language model."""
    for component in (*COMPONENTS, None):
        layers = [fate for fate in case.layers if fate.component == component]
        lost = [fate for fate in layers if fate.quantized]
        if component == LANGUAGE_MODEL or not lost:
            continue
        if any(all(p in case.meant_by(fate) for fate in lost) for p in case.patterns):
            continue  # said already, of the entry that was to keep it
        names = case.names_for(lost)
        if case.given.patterns is None:  # a list will replace this exception
            names += [fate.module for fate in case.layers if fate.kind == HEAD]
        text = f"To keep it as it is, add {listed(names)} to {SKIP}"
        if component:
            text += f", or load it under {case.plan_that_keeps(component)}"
        yield case.finding(
            WARNING,
            "component-quantized",
            f"{titled(component)} is quantized to {case.given.format}: {len(lost)} "
            f"of its {len(layers)} Linear layers, {size_of(lost)}.",
            f"{text}.",
            lost,
            component,
        )


def kept_language_model(case):
    """Linear layers of the language model that the skip list keeps, and what they cost."""
    kept = [
        fate
        for fate in case.layers
        if fate.component == LANGUAGE_MODEL and fate.kind == LINEAR and not fate.quantized
    ]
    own = [p for p in case.patterns if any(p in fate.kept_by for fate in kept)]
    if own and any(fate.quantized for fate in case.layers):
        yield case.finding(
            NOTE,
            "language-model-kept",
            f"{len(kept)} Linear layers of the language_model stay as they are, kept by "
            f"{listed(own)}: {sum(fate.bytes for fate in kept) / MEGABYTE:,.1f} MB.",
            "If that is not meant, write narrower entries.",
            kept,
            LANGUAGE_MODEL,
        )


def kept_by_class(case):
    """Linear layers that transformers keeps by itself, other than the head."""
    own = set(case.given.patterns or ())
    layers = [fate for fate in case.layers if fate.kind != HEAD and not fate.tied]
    kept = [fate for fate in layers if fate.kept_by and own.isdisjoint(fate.kept_by)]
    if kept:
        by = listed(dict.fromkeys(entry for fate in kept for entry in fate.kept_by))
        yield case.finding(
            NOTE,
            "kept-by-transformers",
            f"{len(kept)} Linear layers, such as {kept[0].module}, stay as they are whatever the "
            f"config says: transformers, or the model's own class, adds {by} to the list.",
            "Nothing to do: a plan leaves them out too.",
            kept,
        )


def fused_experts(case):
    """A mixture's experts: parameters of three dimensions, which nothing here converts."""
    fused = [fate for fate in case.fates if fate.kind == EXPERTS and len(fate.shape) == 3]
    experts = [fate for fate in fused if not fate.tied]
    if experts:
        share = sum(f.bytes for f in experts) / sum(f.bytes for f in case.fates)
        yield case.finding(
            WARNING,
            "experts-kept",
            f"The experts stay in {experts[0].format}: "
            f"{sum(f.parameters for f in experts):,} parameters, "
            f"{sum(f.bytes for f in experts) / MEGABYTE:,.1f} MB, {share:.0%} of the bytes. They "
            "are parameters of three dimensions, and bitsandbytes converts Linear layers.",
            "No skip list and no plan changes this: count them in full (vk.memory.predict does), "
            "or look for a checkpoint that was quantized with another method.",
            experts,
            experts[0].component,
        )


# --- CPUs ----------------------------------------------------------------------------------------

_GUARDED = "On a CPU load it with vk.load, which guards against it. GPUs are not concerned."


def cpu_shapes(case):
    """Shapes that the CPU kernels of bitsandbytes 0.50 cannot handle; see vlmkit.backend.cpu."""
    if case.given.format == "int8":
        return
    layers = [fate for fate in case.layers if fate.quantized and not fate.tied]
    repacked = [f for f in layers if f.shape[1] % BLOCK or f.shape[0] % 32]
    if repacked:
        yield case.finding(
            WARNING,
            "cpu-forward",
            f"On a CPU with AVX512-BF16 a forward pass in eval mode fails in {len(repacked)} "
            f"layers, such as {repacked[0].module} {repacked[0].shape}: the kernel takes "
            f"in_features in multiples of {BLOCK} and out_features in multiples of 32.",
            f"{_GUARDED} By hand: support_avx512bf16_for_cpu = False on each Linear4bit.",
            repacked,
        )
    misread = [f for f in layers if f.shape[1] % 16 == 0 and f.shape[1] % BLOCK]
    if misread:
        yield case.finding(
            WARNING,
            "cpu-dequantize",
            f"On a CPU with AVX512 {len(misread)} layers are dequantized wrongly, such as "
            f"{misread[0].module} {misread[0].shape}: in_features is a multiple of 16 and not of "
            f"{BLOCK}, and the kernel begins a new block at every row.",
            _GUARDED,
            misread,
        )


def float32_compute(case):
    """The default of bnb_4bit_compute_dtype."""
    config = case.given.config
    if case.given.format != "int8" and format_of_dtype(config.bnb_4bit_compute_dtype) == "fp32":
        yield Finding(
            NOTE,
            "float32-compute",
            "Products with 4-bit weights are computed in float32, the default of "
            "BitsAndBytesConfig, which is slow on most devices.",
            "Write bnb_4bit_compute_dtype=torch.bfloat16, as a plan has it.",
        )


RULES = (
    overruled,
    unknown_keys,
    unusable_patterns,
    no_format,
    stored_otherwise,
    tied_weights,
    nothing_quantized,
    patterns,
    quantized_head,
    quantized_components,
    fused_experts,
    cpu_shapes,
    kept_language_model,
    kept_by_class,
    float32_compute,
)
