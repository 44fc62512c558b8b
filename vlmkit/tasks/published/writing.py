"""Rows in the layout that TRL and others read: `messages` with `images`."""

import io

from vlmkit.tasks.published.reading import Pictures, RowReader, message_features


def to_messages(rows):
    """A `datasets.Dataset` with the columns images and messages, as TRL's SFTTrainer takes them.

    rows: what `from_dataset` or `dataset` returned, or other rows in one of its layouts. Each row
    has a list of its pictures, as PNG, and its conversation: a list of {"role", "content"}, in
    which a content is a list of {"type": "image"} and {"type": "text", "text"}. `to_parquet`,
    `save_to_disk` and `push_to_hub` write it with its pictures, and `from_dataset` reads it.

    The layout is that of TRL 1.16 (trl/data_utils.py, prepare_multimodal_messages). Raises
    TaskError and ImageError for a row that cannot be used, with its number.
    """
    import datasets

    features = datasets.Features(
        images=datasets.List(datasets.Image()), messages=message_features()
    )
    return datasets.Dataset.from_list(list(_written(rows)), features=features)


def _written(rows):
    reader = RowReader(None, "the rows")
    pictures = Pictures(rows, reader, ())
    for number, row in enumerate(pictures.rows):
        for one in reader.read(dict(row), number, pictures):
            yield {"images": [_png(image) for image in one["images"]], "messages": one["messages"]}


def _png(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}
