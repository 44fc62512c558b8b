"""Reads pictures: whatever holds a picture becomes an RGB image, or an error that names it.

The processors of transformers take pictures too, but they guess. They show the color that lies
under transparent pixels, ignore a camera's rotation, clip 16-bit pictures to white, and pass on
whatever error a decoder has for a damaged file. Every picture that vlmkit gives to a processor has
gone through `read`, which decides these cases.
"""

import base64
import io
import os
import warnings
from urllib.request import url2pathname

from vlmkit.errors import ImageError

MOST_PIXELS = 2**24
"""Larger pictures are reduced to this many pixels. It is more than any processor of transformers
keeps (Qwen2.5-VL: at most 16,384 patches of 28 x 28, 12.8 million pixels)."""

LONGEST_SHAPE = 200
"""The largest ratio of the longer side to the shorter. Qwen2-VL's processor refuses larger ones.
CLIP's first scales the shorter side to 336: 20,000 x 10 pixels would become 672,000 x 336."""

_ORIENTATION = 0x0112  # the EXIF tag of a camera's rotation


def read(image):
    """The image as a `PIL.Image.Image` of mode RGB, upright, with at most `MOST_PIXELS` pixels.

    `image` is one of

    - a PIL image of any mode;
    - a path to a file in any format that Pillow reads, also written as `file:///...`; of an
      animation, the first frame is used;
    - a dict of bytes and path, which is how `datasets` stores a picture that is not decoded;
    - bytes of a file, an opened file, or a `data:` address with a picture in base64;
    - an array or tensor of shape (H, W), (H, W, C) or (C, H, W) with 1, 3 or 4 channels: unsigned
      8 or 16 bits, booleans, other integers from 0 to 255, or floats from 0 to 1. An ambiguous
      shape, such as (3, 5, 3), is refused.

    Transparent pictures get a white background, an EXIF rotation is applied, 16-bit values are
    scaled to 8 bits, CMYK is converted without a color profile, and a picture larger than
    `MOST_PIXELS` is reduced in proportion.

    Raises `ImageError`, with the name of the file, if it is missing, a directory, empty, damaged,
    cut off, not an image, without pixels, more than `LONGEST_SHAPE` times as long as wide, or
    larger than `PIL.Image.MAX_IMAGE_PIXELS`, Pillow's guard against files that unpack to gigabytes.
    """
    from PIL import Image

    if isinstance(image, Image.Image):
        name = f"the image {os.path.basename(getattr(image, 'filename', '') or '')}".rstrip()
        return _rgb(image, name)
    if isinstance(image, (str, os.PathLike)) and not _is_data(image):
        return _read_file(image)
    content, name = _bytes_of(image)
    if content is not None:
        if not content:
            raise ImageError(f"{name} is empty (0 bytes).")
        return _decoded(io.BytesIO(content), name)
    if isinstance(image, dict) and image.get("path"):
        return _read_file(image["path"])
    if hasattr(image, "__array__") or hasattr(image, "detach"):
        return _rgb(_from_array(image), "the array")
    raise ImageError(
        f"An image is a PIL image, a path, bytes, an opened file or an array, and this is a "
        f"{type(image).__name__}. Several images are a list of these."
    )


def check_all(images):
    """Raise the ImageError of `read_all` for pictures that are not there: None, a file that does
    not exist or is empty, no bytes. Pictures are not decoded."""
    for image in images:
        _check(image)


def _check(image):
    if isinstance(image, (str, os.PathLike)) and not _is_data(image):
        _file(image)
    elif isinstance(image, dict) and image.get("bytes") is None and image.get("path"):
        _file(image["path"])
    elif image is None or isinstance(image, (dict, bytes)):
        content, name = _bytes_of(image)
        if not content:
            raise ImageError("there is no picture." if content is None else f"{name} has 0 bytes.")


def _is_data(image):
    return isinstance(image, str) and image.startswith("data:")


def _bytes_of(image):
    """(the bytes of a picture that is in memory as a file would be, its name); None for others."""
    name = "the image"
    if isinstance(image, dict) and {"bytes", "path"} >= image.keys() and image.get("bytes"):
        return image["bytes"], os.path.basename(image.get("path") or "") or name
    if isinstance(image, dict) and image.keys() == {"bytes", "path"} and image["bytes"] is not None:
        return b"", os.path.basename(image["path"] or "") or name
    if isinstance(image, (bytes, bytearray, memoryview)):
        return bytes(image), "the bytes"
    if _is_data(image):
        try:
            return base64.b64decode(image.partition(",")[2], validate=True), name
        except ValueError as error:
            raise ImageError(f"A data: address is not base64: {error}.") from error
    if callable(getattr(image, "read", None)) and not hasattr(image, "__array__"):
        name = os.path.basename(str(getattr(image, "name", name)))
        try:
            if callable(getattr(image, "seek", None)):
                image.seek(0)  # it may have been read before, in another epoch
            content = image.read()
        except (OSError, ValueError) as error:
            raise ImageError(f"{name} cannot be read: {error}.") from error
        if not isinstance(content, bytes):
            raise ImageError(f"{name} is opened as text: open it with mode 'rb'.")
        return content, name
    return None, name


def read_all(images):
    """A list of images, each as `read` returns it. A single image becomes a list of one.

    A list or tuple is several images, or none; anything else is one image. Raises `ImageError`,
    with the number of the image.
    """
    if not isinstance(images, (list, tuple)):
        return [read(images)]
    pictures = []
    for number, image in enumerate(images, start=1):
        try:
            pictures.append(read(image))
        except ImageError as error:
            if len(images) == 1:
                raise
            raise ImageError(f"Image {number} of {len(images)}: {error}") from error
    return pictures


def undecoded(dataset):
    """A dataset of the `datasets` library with all its pictures as bytes or paths. Other rows, such
    as a list, are returned as they are.

    `read` reads the pictures then. If `datasets` reads a picture itself and cannot, its error names
    neither the row nor the file.
    """
    import datasets

    features = getattr(dataset, "features", None) or {}
    bars = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()  # of a cast that only changes the description of a column
    try:
        for column, feature in features.items():
            stored = _stored(feature)
            if stored != feature:
                dataset = dataset.cast_column(column, stored)
    finally:
        if bars:
            datasets.enable_progress_bars()
    return dataset


def _stored(feature):
    """A feature of `datasets` with every picture in it left undecoded."""
    import datasets

    if isinstance(feature, datasets.Image):
        return datasets.Image(decode=False)
    if isinstance(feature, dict):
        return {name: _stored(inner) for name, inner in feature.items()}
    if isinstance(feature, list):
        return [_stored(inner) for inner in feature]
    if isinstance(feature, datasets.List):
        return datasets.List(_stored(feature.feature), length=feature.length)
    return feature


def _read_file(path):
    path = _file(path)
    return _decoded(path, path)


def without_scheme(path):
    """`path` as the file system takes it, if it is written as an address: file:///data/a%20b.png."""
    if not path.lower().startswith("file:"):
        return path
    return url2pathname(path[len("file:") :].removeprefix("//").removeprefix("localhost"))


def _file(path):
    """The path of a picture's file, which is there and not empty."""
    path = os.path.expanduser(without_scheme(os.fsdecode(path)))
    if "\\" in path and not os.path.exists(path):
        other = path.replace("\\", "/")  # written on a system with another separator
        path = other if os.path.exists(other) else path
    if path.startswith(("http://", "https://")):
        raise ImageError(f"{path} is an address, and vlmkit reads files only: download it first.")
    # os.path answers False where pathlib raises: for a name that is too long for the file system,
    # such as a question in place of a picture.
    if os.path.isdir(path):
        raise ImageError(f"{path} is a directory: name the picture in it.")
    if not os.path.exists(path):
        raise ImageError(f"There is no file {path}; the current directory is {os.getcwd()}.")
    if not os.path.isfile(path):
        raise ImageError(f"{path} is not a regular file.")
    if os.path.getsize(path) == 0:
        raise ImageError(f"The file {path} is empty (0 bytes).")
    return path


def _decoded(file, name):
    """The picture in a file, given by its path or opened. Errors call it `name`."""
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            # Between once and twice its limit Pillow only warns. Here the limit is an error.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file) as image:
                # A JPEG can be unpacked at 1/2, 1/4 or 1/8 of its size; other formats cannot.
                image.draft(None, _size_within(image.size, MOST_PIXELS))
                return _rgb(image, name)
    except ImageError:
        raise
    except PermissionError as error:
        raise ImageError(f"{name} may not be read: {error.strerror}.") from error
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise ImageError(
            f"{name} unpacks to more than {Image.MAX_IMAGE_PIXELS:,} pixels, Pillow's limit. Make "
            "it smaller, or, if you trust it, raise PIL.Image.MAX_IMAGE_PIXELS."
        ) from error
    except UnidentifiedImageError as error:
        raise ImageError(f"{name} is not an image in a format that Pillow can read.") from error
    except Exception as error:  # every decoder of Pillow has errors of its own
        raise ImageError(f"{name} is damaged: {error}.") from error


def _rgb(image, name):
    from PIL import ImageOps

    width, height = image.size
    if width == 0 or height == 0:
        raise ImageError(f"{name} has no pixels: it is {width} x {height}.")
    if max(width, height) > LONGEST_SHAPE * min(width, height):
        raise ImageError(
            f"{name} is {width:,} x {height:,} pixels, longer than {LONGEST_SHAPE} : 1. No model "
            "can use such a shape: crop the picture or cut it into several."
        )
    try:
        image.load()
        if image.getexif().get(_ORIENTATION, 1) != 1:
            image = ImageOps.exif_transpose(image)
    except Exception as error:  # as above
        raise ImageError(f"{name} is damaged or cut off: {error}.") from error
    image = _opaque(_eight_bits(image, name), name)
    smaller = _size_within(image.size, MOST_PIXELS)
    return image if smaller == image.size else image.resize(smaller, reducing_gap=2.0)


def _size_within(size, most):
    width, height = size
    scale = min(1.0, (most / (width * height)) ** 0.5)
    return max(1, int(width * scale)), max(1, int(height * scale))


def _eight_bits(image, name):
    """A gray image of more than 8 bits a pixel, scaled to 8 bits. Other images do not change.

    Pillow's own conversion clips, so that most of a 16-bit picture becomes white. Its decoders
    read 16-bit files as mode I;16 or I, with values from 0 to 65,535.
    """
    import numpy as np

    if image.mode == "F":
        return _from_array(np.asarray(image), name)
    if image.mode == "I" or image.mode.startswith("I;"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ImageError(
                f"{name} has values from {values.min()} to {values.max()}, and 16 bits hold 0 to "
                "65,535: scale it to 8 or 16 bits."
            )
        return _from_array(values.astype("uint16"), name)
    return image


def _opaque(image, name):
    """The image as RGB, with white behind transparent pixels."""
    from PIL import Image

    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    try:
        if image.has_transparency_data:
            opaque = Image.new("RGBA", image.size, "white")
            opaque.alpha_composite(image.convert("RGBA"))
            return opaque.convert("RGB")
        return image.convert("RGB")
    except ValueError as error:
        raise ImageError(
            f"{name} has mode {image.mode}, which Pillow cannot convert to RGB: save it as RGB."
        ) from error


def _from_array(array, name="the array"):
    """An array or tensor as a PIL image of mode L, RGB or RGBA."""
    import numpy as np
    from PIL import Image

    if hasattr(array, "detach"):
        array = array.detach().cpu()
        if array.is_floating_point():
            array = array.float()  # numpy has no bfloat16
    array = np.asarray(array)
    if array.size == 0:
        raise ImageError(f"{name} has no pixels: its shape is {array.shape}.")
    return Image.fromarray(np.ascontiguousarray(_as_bytes(_channels_last(array, name), name)))


def _channels_last(array, name):
    """The array as (H, W), (H, W, 3) or (H, W, 4)."""
    if array.ndim == 2:
        return array
    first, last = (array.ndim == 3 and array.shape[axis] in (1, 3, 4) for axis in (0, -1))
    if not (first or last):
        raise ImageError(
            f"{name} has the shape {array.shape}; an image is (H, W), (H, W, C) or (C, H, W), "
            "with 1, 3 or 4 channels. Several images are a list of arrays."
        )
    if first and last:
        raise ImageError(
            f"{name} has the shape {array.shape}, which may be (H, W, C) or (C, H, W): give a PIL "
            "image instead."
        )
    if first:
        array = array.transpose(1, 2, 0)
    return array[..., 0] if array.shape[-1] == 1 else array


def _as_bytes(array, name):
    """The values as unsigned bytes."""
    import numpy as np

    if array.dtype == np.uint8:
        return array
    if array.dtype == bool:
        return array.astype(np.uint8) * 255
    if array.dtype == np.uint16:
        return ((array.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
    if array.dtype.kind not in "iuf":
        raise ImageError(f"{name} holds {array.dtype}, and an image holds integers or floats.")
    floats = array.dtype.kind == "f"
    most, slack = (1.0, 1e-3) if floats else (255, 0)  # resizing overshoots a little
    low, high = array.min(), array.max()
    if not (low >= -slack and high <= most + slack):  # this is also the case for NaN
        raise ImageError(
            f"{name} holds values from {low:g} to {high:g}, and an image of {array.dtype} holds "
            f"{'floats from 0 to 1' if floats else 'integers from 0 to 255'}. Undo a processor's "
            "normalization, or divide by the largest value."
        )
    return (np.rint(np.clip(array, 0, 1) * 255) if floats else array).astype(np.uint8)
