"""Reading pictures: whatever holds one becomes an RGB image, or an error that names it.

A processor of transformers accepts images too, but it guesses: it takes transparent pixels for
the color that happens to lie under them, ignores a camera's rotation mark, clips 16-bit images
to white, and answers a damaged file with whatever error its decoder had. Every image that vlmkit
gives to a processor has passed through `read`, so these cases are decided here, once.
"""

import io
import os
import warnings

from .errors import ImageError

MOST_PIXELS = 2**24
"""Larger pictures are reduced to this many pixels, more than any processor of transformers keeps
(Qwen2.5-VL: at most 16,384 patches of 28 x 28, 12.8 million pixels)."""

LONGEST_SHAPE = 200
"""The longest shape, as longer side : shorter side. Qwen2-VL's processor refuses longer ones, and
CLIP's scales the shorter side to 336 first, which makes of 20,000 x 10 pixels 672,000 x 336."""

_ORIENTATION = 0x0112  # the EXIF tag of a camera's rotation


def read(image):
    """The image as a `PIL.Image.Image` of mode RGB, upright, of at most `MOST_PIXELS` pixels.

    `image` is one of

    - a PIL image of any mode, or a path to a file in any format Pillow reads; of an animation the
      first frame counts;
    - a dict of bytes and path, which is how `datasets` holds a picture that it has not decoded;
    - an array or tensor of shape (H, W), (H, W, C) or (C, H, W) with 1, 3 or 4 channels: 8 or 16
      bits unsigned, booleans, other integers from 0 to 255, or floats from 0 to 1. A shape that
      could be read either way, such as (3, 5, 3), is refused.

    Transparent images are put on a white ground, a rotation noted in EXIF is carried out, 16-bit
    values are scaled to 8 bits, CMYK is converted without a color profile, and a picture larger
    than `MOST_PIXELS` is reduced, keeping its shape.

    Raises `ImageError`, naming the file, for what is missing, a directory, empty, damaged, cut
    off, no image, without pixels, more than 200 times as long as wide, or larger than Pillow's own
    limit, `PIL.Image.MAX_IMAGE_PIXELS`, which guards against files that unpack to gigabytes.
    """
    from PIL import Image

    if isinstance(image, Image.Image):
        name = f"the image {os.path.basename(getattr(image, 'filename', '') or '')}".rstrip()
        return _rgb(image, name)
    if isinstance(image, (str, os.PathLike)):
        return _read_file(image)
    if isinstance(image, dict) and image.keys() == {"bytes", "path"}:
        return _read_stored(image)
    if hasattr(image, "__array__") or hasattr(image, "detach"):
        return _rgb(_from_array(image), "the array")
    raise ImageError(
        f"An image is a PIL image, a path or an array, and this is a {type(image).__name__}. "
        "Several images are given as a list of these."
    )


def read_all(images):
    """The images as a list, each as `read` gives it; one image alone makes a list of one.

    A list or tuple is several images, which may be none at all; anything else is one. Raises
    `ImageError`, and says which image it was.
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


def _read_stored(image):
    """A picture as `datasets` stores it: its bytes, or the path of its file where it has none."""
    name = os.path.basename(image["path"] or "") or "the image"
    if image["bytes"] is None:
        return _read_file(image["path"] or "")
    if not image["bytes"]:
        raise ImageError(f"{name} is empty (0 bytes).")
    return _decoded(io.BytesIO(image["bytes"]), name)


def _read_file(path):
    path = os.path.expanduser(os.fspath(path))
    if isinstance(path, bytes):
        path = os.fsdecode(path)
    if path.startswith(("http://", "https://")):
        raise ImageError(f"{path} is an address, and vlmkit reads files only: download it first.")
    # os.path answers False where pathlib raises: a name too long for the file system, for example
    # a question given in the place of a picture.
    if os.path.isdir(path):
        raise ImageError(f"{path} is a directory: name the picture in it.")
    if not os.path.exists(path):
        raise ImageError(f"There is no file {path}; the current directory is {os.getcwd()}.")
    if not os.path.isfile(path):
        raise ImageError(f"{path} is not a regular file.")
    if os.path.getsize(path) == 0:
        raise ImageError(f"The file {path} is empty (0 bytes).")
    return _decoded(path, path)


def _decoded(file, name):
    """The picture in a file, given by its path or opened; errors call it `name`."""
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            # Between one and two times its limit Pillow warns and goes on; the limit is the limit.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file) as image:
                # A JPEG can be unpacked at a half, a quarter or an eighth of its size; others stay.
                image.draft(None, _size_within(image.size, MOST_PIXELS))
                return _rgb(image, name)
    except ImageError:
        raise
    except PermissionError as error:
        raise ImageError(f"{name} may not be read: {error.strerror}.") from error
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise ImageError(
            f"{name} unpacks to more than {Image.MAX_IMAGE_PIXELS:,} pixels, Pillow's limit: make "
            "it smaller, or, if you trust it, raise PIL.Image.MAX_IMAGE_PIXELS."
        ) from error
    except UnidentifiedImageError as error:
        raise ImageError(f"{name} is not an image in a format that Pillow can read.") from error
    except Exception as error:  # as in _rgb
        raise ImageError(f"{name} is damaged: {error}.") from error


def _rgb(image, name):
    from PIL import ImageOps

    width, height = image.size
    if width == 0 or height == 0:
        raise ImageError(f"{name} has no pixels: it is {width} x {height}.")
    if max(width, height) > LONGEST_SHAPE * min(width, height):
        raise ImageError(
            f"{name} is {width:,} x {height:,} pixels, longer than {LONGEST_SHAPE} : 1, which no "
            "model can make anything of: crop it or cut it into several pictures."
        )
    try:
        image.load()
        if image.getexif().get(_ORIENTATION, 1) != 1:
            image = ImageOps.exif_transpose(image)
    except Exception as error:  # every decoder of Pillow has failures of its own
        raise ImageError(f"{name} is damaged or cut off: {error}.") from error
    image = _flatten(_eight_bits(image, name), name)
    smaller = _size_within(image.size, MOST_PIXELS)
    return image if smaller == image.size else image.resize(smaller, reducing_gap=2.0)


def _size_within(size, most):
    width, height = size
    scale = min(1.0, (most / (width * height)) ** 0.5)
    return max(1, int(width * scale)), max(1, int(height * scale))


def _eight_bits(image, name):
    """Gray images of more than 8 bits a pixel, as 8; others as they are.

    Pillow itself clips here, so that nearly all of a 16-bit picture comes out white. Its decoders
    store 16-bit files as mode I;16 or I, from 0 to 65,535.
    """
    import numpy as np

    if image.mode == "F":
        return _from_array(np.asarray(image), name)
    if image.mode == "I" or image.mode.startswith("I;"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ImageError(
                f"{name} has values from {values.min()} to {values.max()}, where 16 bits hold "
                "0 to 65,535: scale it to 8 or 16 bits."
            )
        return _from_array(values.astype("uint16"), name)
    return image


def _flatten(image, name):
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
            f"{name} is in mode {image.mode}, which has no conversion to RGB: save it as RGB."
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
    return Image.fromarray(_as_bytes(_channels_last(array, name), name))


def _channels_last(array, name):
    """As (H, W), (H, W, 3) or (H, W, 4)."""
    if array.ndim == 2:
        return array
    channels = (1, 3, 4)
    if array.ndim != 3 or not (array.shape[0] in channels or array.shape[-1] in channels):
        raise ImageError(
            f"{name} has the shape {array.shape}; an image is (H, W), (H, W, C) or (C, H, W), "
            "with 1, 3 or 4 channels. Several images are given as a list of arrays."
        )
    if array.shape[0] in channels and array.shape[-1] in channels:
        raise ImageError(
            f"{name} has the shape {array.shape}, which can be read as (H, W, C) and as "
            "(C, H, W): give it as a PIL image."
        )
    if array.shape[0] in channels:
        array = array.transpose(1, 2, 0)
    return array[..., 0] if array.shape[-1] == 1 else array


def _as_bytes(array, name):
    import numpy as np

    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    if array.dtype == bool:
        return array.astype(np.uint8) * 255
    if array.dtype == np.uint16:
        return ((array.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
    if array.dtype.kind in "iu":
        most, allowed = 255, "integers from 0 to 255"
    elif array.dtype.kind == "f":
        most, allowed = 1.0, "floats from 0 to 1"
    else:
        raise ImageError(f"{name} holds {array.dtype}, and an image holds integers or floats.")
    low, high = array.min(), array.max()
    slack = 1e-3 if most == 1.0 else 0  # resizing overshoots a little
    if not (low >= -slack and high <= most + slack):  # also where a value is not a number
        raise ImageError(
            f"{name} holds values from {low:g} to {high:g}, and an image of {array.dtype} holds "
            f"{allowed}. Undo a processor's normalization, or divide by the largest value."
        )
    scaled = array if most == 255 else np.rint(np.clip(array, 0, 1) * 255)
    return np.ascontiguousarray(scaled.astype(np.uint8))
