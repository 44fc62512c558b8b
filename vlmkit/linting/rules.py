"""Rules: each looks for one kind of mistake in a quantization config.

All rules have one shape, `Rule`, and stand in one table, `RULES`, at the end. A rule picks the
parameters that it is about, says what will happen to them, and says what to do.
"""

from vlmkit import COMPONENTS
from vlmkit.errors import did_you_mean
from vlmkit.formats import BLOCK, format_of_dtype
from vlmkit.linting.context import Rule, layers_that, listed, plain, size_of, when
from vlmkit.linting.findings import ERROR, NOTE, SEVERITIES, WARNING
from vlmkit.linting.verdicts import why_unusable
from vlmkit.rows import EXPERTS, HEAD, LINEAR


def findings(context):
    """A tuple with the Findings of all rules, errors first."""
    found = [rule.finding(context, **words) for rule in RULES for words in rule.look(context)]
    return tuple(sorted(found, key=lambda finding: SEVERITIES.index(finding.severity)))


def _unknown_keys(context):
    for key, hint in context.given.ignored.items():
        yield {"key": key, "hint": hint, "severity": ERROR if hint else WARNING}


def _unusable_entries(context):
    for entry in context.given.entries or ():
        if why := why_unusable(entry, context.given.method):
            yield {"entry": entry, "why": why, "place": next(iter(context.places), "lm_head")}


def _nothing_quantized(context):
    if not any(row.quantized for row in context.layers):
        alone = [e for e, kept, _ in context.effects if len(kept) == len(context.layers)]
        key = context.given.method.key or "the config"
        why = f"the entry {alone[0]!r} of {key}" if alone else key
        if context.given.bitsandbytes and context.given.config.llm_int8_has_fp16_weight:
            why = "llm_int8_has_fp16_weight=True"
        yield {"rows": context.layers, "why": why}


def _not_substrings(context):
    for entry, kept, missed in context.effects:
        if missed:
            lost = [row for row in missed if row.quantized]
            better, components = listed(context.entries_for(missed)), _components(missed)
            if context.given.bitsandbytes and context.spared.issuperset(components):
                better += f", or plan by component: {context.plan_that_keeps(components)}"
            result = f"{len(lost)} of the missed layers are quantized: {size_of(lost)}"
            yield {
                "rows": lost or missed,
                "severity": NOTE if not lost else WARNING if kept else ERROR,
                "entry": entry,
                "kept": len(kept) or "none",
                "all": len(kept) + len(missed),
                "example": missed[0].module,
                "result": result if lost else "Other entries keep the missed layers",
                "better": better,
            }


def _useless_entries(matching):
    """A `look` for entries that keep no Linear layer, and match other modules or (not `matching`)
    no module at all."""

    def look(context):
        for entry, kept, missed in context.effects:
            keep = context.entries_that_keep
            reached = tuple(name for name in context.modules if name and keep(name, [entry]))
            if not kept and not missed and bool(reached) == matching:
                hint = "" if matching else _similar(context, entry)
                hint = hint or "If the entry is for another model, it does no harm. "
                places = listed(context.places)
                yield {"modules": reached, "entry": entry, "hint": hint, "places": places}

    return look


def _similar(context, entry):
    """ "Did you mean …? " with an entry that keeps something, or an empty string."""
    ends = [entry.split(".", i)[-1] for i in range(1, entry.count(".") + 1)]
    for end in ends:  # the module may have had another name in front
        usable = end and why_unusable(end, context.given.method) is None
        if usable and any(context.entries_that_keep(row.module, [end]) for row in context.layers):
            return f"Did you mean {end!r}? "
    paths = {}  # {a part of a name: the beginnings of names that end with it}
    for row in context.layers:
        parts = row.module.split(".")
        for i, part in enumerate(parts, 1):
            paths.setdefault(part, set()).add(".".join(parts[:i]))
    better = {part: min(own) if len(own) == 1 else f".*{part}" for part, own in paths.items()}
    if context.given.method.syntax != "prefix":
        better = {part: min(own) for part, own in paths.items()}
    return did_you_mean(plain(entry).strip(".*"), paths, 0.6, show=better)


def _components(rows):
    """The components of rows, in order."""
    there = {row.component for row in rows}
    return [component for component in (*COMPONENTS, None) if component in there]


def _several_components(context):
    for entry, kept, _ in context.effects:
        components = _components(kept)
        if len(components) > 1 and len(kept) < len(context.layers):
            counts = [f"{sum(r.component == c for r in kept)} in {_named(c)}" for c in components]
            yield {"rows": kept, "entry": entry, "counts": ", ".join(counts)}


def _named(component):
    return component or "the part that no rule knows"


def _quantized_components(context):
    for component in _components(context.layers):
        layers = [row for row in context.layers if row.component == component]
        lost = [row for row in layers if row.quantized]
        if component == "language_model" or not lost:
            continue
        if any({*lost} <= {*missed} for _, _, missed in context.effects):
            continue  # not-a-substring says so, about the entry that seems to keep them
        entries = context.entries_for(lost) if context.given.method.key else []
        if context.given.entries is None:  # a list replaces the exception for the head
            entries += [row.module for row in context.layers if row.kind == HEAD and entries]
        planned = component and context.given.bitsandbytes
        yield {
            "rows": lost,
            "component": _named(component),
            "all": len(layers),
            "keep": f"add {listed(entries)} to {context.given.method.key}"
            if entries
            else "quantize only what modules_in_block_to_quantize names",
            "plan": f", or load with {context.plan_that_keeps([component])}" if planned else "",
        }


def _kept_in_language_model(context, row):
    linear = (row.component, row.kind) == ("language_model", LINEAR) and not row.quantized
    own = not set(row.kept_by).isdisjoint(context.given.usable or ())
    return linear and own and any(row.quantized for row in context.layers)


def _kept_by_transformers(context, row):
    plain = row.kept_by and row.kind != HEAD and not row.tied
    return plain and set(row.kept_by).isdisjoint(context.given.usable or ())


def _stored_otherwise(context):
    given = context.given
    rows = [
        row
        for row in context.layers
        if (stored := context.stored.get(row.name, row.format)) != row.format
        and given.format in (stored, row.format)
    ]
    kept = [row for row in context.layers if context.stored.get(row.name) != given.format]
    better = (
        "Load the checkpoint with vk.load(…), which reads the formats from the weight files, and "
        "save it again with vk.save."
    )
    if given.method.key and not given.bitsandbytes:
        entries = context.entries_for(kept) if kept else []
        better = f"In config.json, let {given.method.key} be what the files hold: {entries}."
    elif not given.bitsandbytes:
        better = "Look for a checkpoint whose config.json belongs to its weights."
    if rows:
        yield {"rows": rows, "better": better}


def _four_bits(context, row):
    four = context.given.bitsandbytes and context.given.format != "int8"
    return four and row.quantized and not row.tied


def _cannot_load(context):
    if context.given.method.name == "hqq":
        yield {}


def _unread(context):
    if context.given.method.name == "gptq" and context.given.config.get("dynamic"):
        yield {"dynamic": listed(context.given.config["dynamic"])}


_ON_CPU = "On a CPU, load the model with vk.load, which avoids this kernel. GPUs are not affected."

RULES = (
    Rule(
        "error: overruled",
        when(lambda context: context.overruled is not None),
        "The checkpoint is already quantized. transformers uses the config inside the checkpoint "
        "({given}) and ignores yours ({overruled}). The other findings are about the one inside.",
        "Leave your config out, or use it on the checkpoint that is not quantized.",
    ),
    Rule(
        "error: unknown-key",
        _unknown_keys,
        "BitsAndBytesConfig has no field {key!r}, and ignores the key without a warning.",
        "{hint}Correct the key or remove it.",
    ),
    Rule(
        "error: unusable-pattern",
        _unusable_entries,
        "The entry {entry!r} is {why}. Loading fails because of the entry. The other findings "
        "leave it out.",
        "Write a full module name, such as {place!r}.",
    ),
    Rule(
        "error: no-format",
        when(
            lambda c: (
                c.given.bitsandbytes
                and not (c.given.config.load_in_4bit or c.given.config.load_in_8bit)
            )
        ),
        "The config asks for neither 4 nor 8 bits, but transformers quantizes anyway, to "
        "{given.format}.",
        "Set load_in_4bit=True or load_in_8bit=True, or load without a config.",
    ),
    Rule(
        "error: cannot-load",
        _cannot_load,
        "transformers 5.24 cannot quantize with HQQ while it loads a model: it raises "
        "NotImplementedError. The other findings say what the list would keep.",
        "Use another method, or quantize the loaded model with the package hqq.",
    ),
    Rule(
        "error: unread-list",
        _unread,
        "transformers hands this model to optimum, which does not read `dynamic` ({dynamic}). "
        "Layers that GPT-QModel left out because of it are read as quantized if they are in a "
        "block.",
        "Load the checkpoint with GPT-QModel, or with vLLM.",
    ),
    Rule(
        "error: stored-otherwise",
        _stored_otherwise,
        "The config reads {count} weights in another format than they are stored in. For example, "
        "{first.module} is stored in {stored} and read as {first.format}. Module names change "
        "between releases of transformers, so the skip list may be from another release. Loading "
        "or the first forward pass fails.",
        "{better}",
    ),
    Rule(
        "error: tied-weight",
        layers_that(lambda c, row: row.tied and row.quantized and c.given.bitsandbytes),
        "{names} shares its weight with the embeddings, but becomes a quantized layer. The model "
        "loads, and its first forward pass fails. By default transformers keeps this layer, but "
        "any {skip}, even an empty list, replaces the default.",
        "Add {names} to {skip}. A vk.Plan always keeps this layer.",
    ),
    Rule(
        "error: nothing-quantized",
        _nothing_quantized,
        "Nothing is quantized, because of {why}.",
        "Remove {why}, or load without a config.",
    ),
    Rule(
        "error: not-a-substring",
        _not_substrings,
        "{entry!r} seems to keep {all} Linear layers, such as {example}, but it keeps {kept} of "
        "them. {method.matching}. {result}.",
        "Write {better}.",
    ),
    Rule(
        "note: nothing-to-keep",
        _useless_entries(matching=True),
        "{entry!r} matches {modules[0]} but no Linear layer. {method.name} converts nothing else.",
        "The entry does no harm. You can remove it.",
    ),
    Rule(
        "warning: matches-nothing",
        _useless_entries(matching=False),
        "{entry!r} matches no module of this model.",
        "{hint}The model's Linear layers are in {places}.",
    ),
    Rule(
        "note: several-components",
        _several_components,
        "{entry!r} keeps Linear layers of several components: {counts}. {method.matching}.",
        "To keep only one component, write the full name of its module.",
    ),
    Rule(
        "warning: head-quantized",
        layers_that(
            lambda c, row: (
                row.quantized
                and row.kind == HEAD
                and not (row.tied and c.given.bitsandbytes)
                and c.given.method.key
            )
        ),
        "The output head {names} is quantized ({size}). {method.always}.",
        "Add {names} to {skip}.",
    ),
    Rule(
        "warning: component-quantized",
        _quantized_components,
        "{component} is quantized to {given.format}: {count} of its {all} Linear layers, {size}.",
        "To keep these layers as they are, {keep}{plan}.",
    ),
    Rule(
        "warning: experts-kept",
        layers_that(
            lambda context, row: (
                row.kind == EXPERTS and len(row.shape) == 3 and not row.tied and not row.convertible
            ),
            among="verdicts",
        ),
        "The experts stay in {first.format}: {parameters:,} parameters, {MB:,.1f} MB, {share:.0%} "
        "of all bytes. They are 3-dimensional, and {method.name} converts only Linear layers.",
        "Count the experts in full, as vk.memory.predict does, or look for a checkpoint that was "
        "quantized with another method. No skip list and no plan quantizes them.",
    ),
    Rule(
        "warning: cpu-forward",
        layers_that(
            lambda c, row: _four_bits(c, row) and (row.shape[1] % BLOCK or row.shape[0] % 32)
        ),
        "On a CPU with AVX512-BF16, a forward pass in eval mode fails in {count} layers, such as "
        f"{{first.module}} {{first.shape}}. The kernel needs in_features in multiples of {BLOCK} "
        "and out_features in multiples of 32.",
        f"{_ON_CPU} Without vlmkit, set support_avx512bf16_for_cpu = False on each Linear4bit.",
    ),
    Rule(
        "warning: cpu-dequantize",
        layers_that(
            lambda c, row: _four_bits(c, row) and row.shape[1] % 16 == 0 and row.shape[1] % BLOCK
        ),
        "On a CPU with AVX512, {count} layers are dequantized wrongly, such as {first.module} "
        f"{{first.shape}}. Their in_features is a multiple of 16 but not of {BLOCK}, and the "
        "kernel starts a new block at every row.",
        _ON_CPU,
    ),
    Rule(
        "note: language-model-kept",
        layers_that(_kept_in_language_model),
        "{count} Linear layers of the language_model are not quantized, because of {entries}. "
        "They take {MB:,.1f} MB.",
        "If you want them quantized, write narrower entries.",
    ),
    Rule(
        "note: kept-by-transformers",
        layers_that(_kept_by_transformers),
        "{count} Linear layers, such as {first.module}, are never quantized: transformers, or the "
        "model's own class, adds {entries} to every skip list.",
        "Nothing to do: a plan keeps these layers too.",
    ),
    Rule(
        "note: float32-compute",
        when(
            lambda context: (
                context.given.bitsandbytes
                and context.given.format != "int8"
                and format_of_dtype(context.given.config.bnb_4bit_compute_dtype) == "fp32"
            )
        ),
        "Products with 4-bit weights are computed in float32, the default of BitsAndBytesConfig. "
        "That is slow on most devices.",
        "Write bnb_4bit_compute_dtype=torch.bfloat16, as a plan does.",
    ),
)
"""In the order in which findings of one severity are shown. The shapes that CPU kernels cannot
handle are those of bitsandbytes 0.50; see vlmkit.backend.cpu."""

OF_THE_LIST = {
    "unusable-pattern",
    "tied-weight",
    "not-a-substring",
    "matches-nothing",
    "head-quantized",
    "component-quantized",
}
"""Codes of the findings that another skip list settles."""
