"""Published data sets of visual question answering, in the shape of vlmkit's own tasks.

schemas.py  the layouts: which columns say what, and how one is recognized
opening.py  files, folders, saved datasets and the hub
reading.py  rows checked and pictures read, by number or as a stream
"""

import warnings

from vlmkit.errors import TaskError
from vlmkit.tasks.published.opening import opened
from vlmkit.tasks.published.reading import Joined, Pictures, Texts, columns_of, mapped, streamed
from vlmkit.tasks.published.schemas import PICTURES, SCHEMAS, find

__all__ = ["SCHEMAS", "from_dataset"]


def from_dataset(
    source,
    schema=None,
    split=None,
    streaming=False,
    limit=None,
    *,
    name=None,
    images=None,
    prompt=None,
    on_error="raise",
    skipped=None,
    decode=True,
    **loading,
):
    """Questions from published data: a `datasets.Dataset` of rows like those of `dataset`.

    Columns: images (a list of RGB pictures, read when a row is asked for), question, answer, task
    (the schema's name), kind (as the data set divides its questions, else "all") and answers (all
    that are accepted). The texts are held in memory, the pictures stay where they are. Splits,
    shuffles and selections keep this; `save_to_disk` would save the rows without their pictures.

    source: a parquet, JSON-lines or JSON file, or a folder of them; what `save_to_disk` wrote; an
        opened dataset of the `datasets` library; or a hub id. Paths of pictures are relative to the
        file or folder.
    schema: one of `SCHEMAS`, by default told from the columns. The layouts, as published on the hub
        up to November 2026, with the columns that are looked at:

        vqav2         lmms-lab/VQAv2 -> image, question, multiple_choice_answer, answers (ten
                      records with answer), answer_type
        textvqa       lmms-lab/textvqa, facebook/textvqa -> image, question, answers (ten texts)
        docvqa        lmms-lab/DocVQA -> image, question, answers (texts), question_types
        chartqa       HuggingFaceM4/ChartQA -> image, query, label (texts), human_or_machine
        gqa           lmms-lab/GQA -> question, answer, types and image or imageId; with the second,
                      the pictures are in another subset, see `images`
        aokvqa        HuggingFaceM4/A-OKVQA -> image, question, choices, correct_choice_idx,
                      direct_answers (texts, or one that spells their list). The question is asked
                      without its choices
        the_cauldron  HuggingFaceM4/the_cauldron -> images, texts (records with user, assistant,
                      source). Each turn is a row with all the pictures, without the turns before it
        plain         your own: image or images, question, answer; where known answers, task, kind

        The original files of these data sets, with questions, answers and pictures apart, are not
        among them.
    split: its name, needed where there are several. name: the hub data set's subset.
    streaming: an `IterableDataset`, which holds nothing; `list(rows.take(n))` is what
        `vlmkit.evaluate` takes of it. An opened one always streams.
    limit: give this many rows at most, reading no further.
    images: for imageId, a source with the columns id and image; by default, on the hub, the subset
        called ..._images where that of the questions is called ..._instructions.
    prompt: a text around each question, such as "{question}\\nAnswer the question using a single
        word or phrase.", which many published results are made with.
    on_error: "raise" at a row without a question, an answer or a readable picture, or "skip" it and
        warn how many there were. Pictures are then all read once at the start, except in a stream.
    skipped: a list that takes (row number, why) for each one skipped, in a stream as it goes.
    decode: False leaves pictures as bytes or paths, for a training whose collator reads them and
        has a policy of its own for those that it cannot read; nothing is then read at the start.
    loading: further arguments of `datasets.load_dataset`, such as revision, token or cache_dir.

    Raises TaskError for a source that cannot be opened, several splits, columns of no known layout
    and unusable rows, and ImageError where a picture is, all with the row's number.
    """
    import datasets

    _check_options(limit, prompt, on_error, skipped)
    if split is not None and isinstance(source, (datasets.Dataset, datasets.IterableDataset)):
        raise TaskError(f"An opened dataset is one split already; split is {split!r}.")
    data, folder, title = opened(source, split, streaming, name, **loading)
    if streaming and isinstance(data, datasets.Dataset):
        data = data.to_iterable_dataset()
    layout = find(columns_of(data), schema)
    noted = None if on_error == "raise" else [] if skipped is None else skipped
    texts = Texts(layout, title, prompt, noted)
    if any(column in columns_of(data) for column in PICTURES):
        pictures = Pictures(data, folder, title, decode)
    else:
        pictures = Joined(*_images(images, source, split, name, loading, title), decode)
    if isinstance(data, datasets.IterableDataset):
        return streamed(data, texts, pictures, limit)
    before = len(noted or ())
    rows = mapped(data, texts, pictures, limit)
    if noted and len(noted) > before:
        n, (first, why) = len(noted) - before, noted[before]
        warnings.warn(f"{title}: skipped {n}, the first of them row {first}: {why}", stacklevel=2)
    return rows


def _images(images, source, split, name, loading, title):
    """What `opened` gives of the pictures that a row names by imageId."""
    if images is not None:
        found, folder, title = opened(images, split)
        return found, folder, f"{title} of images"
    if isinstance(source, str) and name and name.endswith("_instructions"):
        return opened(source, split, name=f"{name.removesuffix('_instructions')}_images", **loading)
    raise TaskError(
        f"The rows of {title} name their pictures by imageId: give the pictures with images=, a "
        "source with the columns id and image."
    )


def _check_options(limit, prompt, on_error, skipped):
    if limit is not None and (type(limit) is not int or limit < 1):
        raise TaskError(f"limit is a whole number of rows from 1, or None; it is {limit!r}.")
    if prompt is not None and "{question}" not in str(prompt):
        raise TaskError(f"A prompt has {{question}} where the question goes; it is {prompt!r}.")
    if on_error not in ("raise", "skip"):
        raise TaskError(f"on_error is 'raise' or 'skip'; it is {on_error!r}.")
    if skipped is not None and (on_error != "skip" or not isinstance(skipped, list)):
        raise TaskError("skipped is a list that rows are noted in, with on_error='skip'.")
