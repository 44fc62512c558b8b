"""Every kind of picture that a user may have becomes an RGB image or a clear error."""

import time

import numpy as np
import pytest
from PIL import Image

from vlmkit import images
from vlmkit.errors import ImageError


def picture(size=(8, 6)):
    """Red on the left, blue on the right, which shows a rotation or exchanged channels."""
    image = Image.new("RGB", size, "blue")
    image.paste("red", (0, 0, size[0] // 2, size[1]))
    return image


def pixel(image, x, y):
    assert image.mode == "RGB"
    return image.getpixel((x, y))


@pytest.mark.parametrize("suffix", ["png", "bmp", "gif", "webp", "tiff"])
def test_a_file_comes_back_pixel_for_pixel(tmp_path, suffix):
    path = tmp_path / f"picture.{suffix}"
    picture().save(path, **({"lossless": True} if suffix == "webp" else {}))
    for given in (path, str(path)):
        assert np.array_equal(np.asarray(images.read(given)), np.asarray(picture()))


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "CMYK", "YCbCr", "RGBA", "LA", "HSV"])
def test_a_pil_image_of_any_mode_keeps_its_look(mode):
    white = Image.new("RGB", (4, 4), "white").convert(mode)
    assert pixel(images.read(white), 1, 1) == (255, 255, 255)
    black = Image.new("RGB", (4, 4), "black").convert(mode)
    assert pixel(images.read(black), 1, 1) == (0, 0, 0)


def test_cmyk_jpeg(tmp_path):
    path = tmp_path / "print.jpg"
    Image.new("RGB", (16, 16), "red").convert("CMYK").save(path)
    red, green, blue = pixel(images.read(path), 8, 8)
    assert red > 240 and green < 15 and blue < 15


def test_transparent_pixels_become_white_whatever_color_they_hide(tmp_path):
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (255, 0, 0, 255))
    assert pixel(images.read(image), 0, 0) == (255, 255, 255)
    assert pixel(images.read(image), 1, 0) == (255, 0, 0)

    palette = Image.new("P", (2, 1), 0)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "palette.png", transparency=0)
    assert pixel(images.read(tmp_path / "palette.png"), 0, 0) == (255, 255, 255)
    assert pixel(images.read(tmp_path / "palette.png"), 1, 0) == (255, 0, 0)


def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path):
    values = np.array([[0, 32768, 65535]], dtype=np.uint16)
    for suffix in ("png", "tiff", "pgm"):
        path = tmp_path / f"gray.{suffix}"
        Image.fromarray(values).save(path)
        assert [pixel(images.read(path), x, 0)[0] for x in range(3)] == [0, 128, 255]
    assert [pixel(images.read(values), x, 0)[0] for x in range(3)] == [0, 128, 255]
    with pytest.raises(ImageError, match="70000"):
        images.read(Image.fromarray(values.astype(np.int32) + np.int32(70000 - 65535)))


@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_a_camera_rotation_is_carried_out(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture((32, 16)).save(tmp_path / "camera.png", exif=exif)
    turned = np.rot90(np.asarray(picture((32, 16))), {3: 2, 6: -1, 8: 1}[orientation])
    assert np.array_equal(np.asarray(images.read(tmp_path / "camera.png")), turned)
    with Image.open(tmp_path / "camera.png") as opened:
        assert np.array_equal(np.asarray(images.read(opened)), turned)


def test_the_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "green", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert pixel(images.read(tmp_path / "a.gif"), 0, 0) == (255, 0, 0)


def test_arrays_and_tensors():
    import torch

    expected = np.asarray(picture())
    floats = expected / 255
    for array in (
        expected,
        expected.astype(np.int64),
        floats,
        floats.astype(np.float16),
        expected.transpose(2, 0, 1),
        torch.tensor(floats).permute(2, 0, 1),
        torch.tensor(floats, dtype=torch.bfloat16, requires_grad=True),
    ):
        assert np.abs(np.asarray(images.read(array)).astype(int) - expected).max() <= 1
    gray = np.full((5, 7), 128, dtype=np.uint8)
    for array in (gray, gray[..., None], gray[None]):
        image = images.read(array)
        assert image.size == (7, 5) and pixel(image, 0, 0) == (128, 128, 128)
    assert pixel(images.read(np.ones((5, 7), dtype=bool)), 0, 0) == (255, 255, 255)
    clear = np.zeros((5, 7, 4), dtype=np.uint8)
    assert pixel(images.read(clear), 0, 0) == (255, 255, 255)


@pytest.mark.parametrize(
    ("array", "says"),
    [
        (np.zeros((0, 4, 3)), "no pixels"),
        (np.zeros((5, 5, 2)), r"\(5, 5, 2\)"),
        (np.zeros((2, 8, 8, 3)), "list"),
        (np.zeros(9), r"\(9,\)"),
        (np.zeros((3, 5, 3)), "PIL"),
        (np.full((8, 8, 3), 200.0), "0 to 1"),
        (np.full((8, 8, 3), -0.5), "0 to 1"),
        (np.full((8, 8), np.nan), "0 to 1"),
        (np.full((8, 8), 256), "0 to 255"),
        (np.full((8, 8), "red"), "holds"),
        (np.zeros((8, 8), dtype=complex), "complex"),
    ],
)
def test_arrays_that_are_no_image(array, says):
    with pytest.raises(ImageError, match=says):
        images.read(array)


def test_small_and_long_images():
    assert images.read(Image.new("RGB", (1, 1), "red")).size == (1, 1)
    assert images.read(np.full((1, 1), 7, dtype=np.uint8).repeat(2, axis=1)).size == (2, 1)
    assert images.read(Image.new("L", (20_000, 100))).size == (20_000, 100)
    with pytest.raises(ImageError, match="20,000 x 1 "):
        images.read(Image.new("RGB", (20_000, 1)))
    with pytest.raises(ImageError, match="no pixels"):
        images.read(Image.new("RGB", (0, 5)))


def test_a_picture_20_000_pixels_wide_is_reduced_and_quick(tmp_path):
    path = tmp_path / "wide.jpg"
    picture((20_000, 4_000)).save(path)
    start = time.process_time()  # of this process alone
    image = images.read(path)
    assert time.process_time() - start < 3
    assert image.width * image.height <= images.MOST_PIXELS
    assert image.width / image.height == pytest.approx(5, rel=0.01)
    assert pixel(image, 10, 10)[0] > 200 and pixel(image, image.width - 10, 10)[2] > 200


def test_a_decompression_bomb_is_refused_without_unpacking(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    for size in ((12, 10), (60, 60)):  # Pillow itself only warns about the first
        path = tmp_path / f"{size[0]}.png"
        Image.new("RGB", size).save(path)
        with pytest.raises(ImageError, match=rf"{path.name} unpacks to more than 100 pixels"):
            images.read(path)


def test_files_that_are_no_image(tmp_path):
    def write(name, content):
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    noise.save(tmp_path / "whole.png")
    noise.save(tmp_path / "whole.jpg")
    png, jpg = (tmp_path / "whole.png").read_bytes(), (tmp_path / "whole.jpg").read_bytes()
    cases = {
        tmp_path / "missing.png": "no file",
        tmp_path: "directory",
        write("empty.png", b""): "0 bytes",
        write("notes.png", b"no picture at all"): "not an image",
        write("cut.png", png[: len(png) // 2]): "damaged|cut off",
        write("cut.jpg", jpg[: len(jpg) // 2]): "damaged|cut off",
        write("header.png", png[:20]): "damaged|not an image",
        write("bits.png", png[:200] + bytes(50) + png[250:]): "damaged|cut off",
        "https://example.org/cat.png": "download",
        "What color is the circle? " * 40: "no file",
    }
    for path, says in cases.items():
        with pytest.raises(ImageError, match=says) as caught:
            images.read(path)
        assert str(path) in str(caught.value)


def test_a_lazily_opened_image_that_is_cut_off_says_which(tmp_path):
    picture((64, 64)).save(tmp_path / "whole.bmp")
    (tmp_path / "cut.bmp").write_bytes((tmp_path / "whole.bmp").read_bytes()[:2000])
    with pytest.raises(ImageError, match=r"cut\.bmp"):
        images.read(Image.open(tmp_path / "cut.bmp"))


@pytest.mark.parametrize("thing", [None, 7, {"bytes": b""}, b"\x89PNG"])
def test_things_that_are_no_image(thing):
    with pytest.raises(ImageError, match=type(thing).__name__):
        images.read(thing)


def test_a_list_says_which_image_is_wrong(tmp_path):
    assert [i.size for i in images.read_all([picture(), np.zeros((4, 5))])] == [(8, 6), (5, 4)]
    assert len(images.read_all(picture())) == 1
    assert images.read_all([]) == []
    with pytest.raises(ImageError, match="Image 2 of 2: .*nowhere"):
        images.read_all([picture(), tmp_path / "nowhere.png"])


def test_the_image_given_is_left_as_it_was(tmp_path):
    image = picture()
    image.putalpha(10)
    images.read(image)
    assert image.mode == "RGBA" and image.getpixel((0, 0)) == (255, 0, 0, 10)
