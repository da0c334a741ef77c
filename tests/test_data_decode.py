"""One file -> one array: every kind of file a folder may hold, against references computed another way."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from unrote.data.decode import MAX_PIXELS, BadImage, DecodeSettings, decode_file, decode_stream, to_pixels

OWN_SIZE = DecodeSettings(None)


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def decode(image: Image.Image, settings: DecodeSettings = OWN_SIZE, **save: object) -> np.ndarray:
    buffer = io.BytesIO()
    image.save(buffer, **save)
    buffer.seek(0)
    return decode_stream(buffer, settings)[0]


def png(width: int, height: int, bits: int, colour: int, rows: bytes) -> bytes:
    """A PNG written by hand, so that neither the encoder nor the decoder under test is trusted with it."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def reason(content: bytes, tmp_path: Path) -> str:
    path = tmp_path / "image.png"
    path.write_bytes(content)
    with pytest.raises(BadImage) as error:
        decode_file(path, OWN_SIZE)
    return str(error.value)


def test_rgb_png_is_untouched() -> None:
    pixels = noise(9, 7, 3)
    assert np.array_equal(decode(Image.fromarray(pixels), format="PNG"), pixels)


@pytest.mark.parametrize("order", ["<", ">"])
def test_sixteen_bit_grey_tiff_is_scaled(order: str, tmp_path: Path) -> None:
    wide = np.array([[0, 128, 257, 40000, 65535]], dtype=f"{order}u2")
    path = tmp_path / "x.tiff"
    Image.fromarray(wide).save(path)
    expected = np.rint(wide.astype(np.float64) / 257).astype(np.uint8)
    pixels, _ = decode_file(path, DecodeSettings(None, channels=1))
    assert np.array_equal(pixels[..., 0], expected)


def test_sixteen_bit_png_is_scaled_not_clipped() -> None:
    wide = np.array([[0, 300, 20000, 65535]], dtype=">u2")
    content = png(4, 1, 16, 0, b"\0" + wide.tobytes())
    pixels, _ = decode_stream(io.BytesIO(content), OWN_SIZE)
    assert np.array_equal(pixels[0, :, 0], np.rint(wide[0] / 257))
    colour = np.array([[[0, 30000, 65535], [65535, 1, 257]]], dtype=">u2")
    pixels, _ = decode_stream(io.BytesIO(png(2, 1, 16, 2, b"\0" + colour.tobytes())), OWN_SIZE)
    assert np.abs(pixels.astype(int) - colour / 257).max() <= 1


def test_cmyk_jpeg() -> None:
    red = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    assert np.abs(decode(red, format="JPEG", quality=95).astype(int) - (255, 0, 0)).max() <= 6


def test_adobe_cmyk_jpeg_is_not_inverted() -> None:
    buffer = io.BytesIO()
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(buffer, format="JPEG", quality=95)
    assert b"Adobe" in buffer.getvalue()[:64]  # Pillow writes the marker and inverted inks, as Photoshop does
    pixels, _ = decode_stream(io.BytesIO(buffer.getvalue()), OWN_SIZE)
    assert pixels[..., 0].min() > 240 and pixels[..., 1:].max() < 15


def test_cmyk_tiff(tmp_path: Path) -> None:
    Image.new("CMYK", (4, 4), (255, 0, 0, 0)).save(tmp_path / "x.tif")
    pixels, _ = decode_file(tmp_path / "x.tif", OWN_SIZE)
    assert np.array_equal(pixels, np.broadcast_to(np.uint8([0, 255, 255]), (4, 4, 3)))


def over_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    a = alpha[..., None].astype(np.float64) / 255
    return colour * a + 255 * (1 - a)


def test_alpha_goes_on_white() -> None:
    rgba = noise(8, 8, 4)
    assert np.abs(decode(Image.fromarray(rgba), format="PNG") - over_white(rgba[..., :3], rgba[..., 3])).max() <= 1
    la = noise(8, 8, 2)
    expected = over_white(np.repeat(la[..., :1], 3, axis=2), la[..., 1])
    assert np.abs(decode(Image.fromarray(la, "LA"), format="PNG") - expected).max() <= 1


def test_palette_with_transparency_goes_on_white() -> None:
    image = Image.fromarray(np.array([[0, 1], [2, 1]], dtype=np.uint8), "P")
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    pixels = decode(image, format="PNG", transparency=bytes([255, 0, 255]))
    assert pixels.tolist() == [[[255, 0, 0], [255, 255, 255]], [[0, 0, 255], [255, 255, 255]]]
    pixels = decode(image, format="PNG", transparency=2)
    assert pixels[1, 0].tolist() == [255, 255, 255] and pixels[0, 0].tolist() == [255, 0, 0]


def test_grey_for_one_channel() -> None:
    pixels = noise(5, 5, 3)
    grey = decode(Image.fromarray(pixels), DecodeSettings(None, channels=1), format="PNG")
    assert grey.shape == (5, 5, 1)
    assert np.abs(grey[..., 0] - pixels @ np.array([0.299, 0.587, 0.114])).max() <= 1
    assert decode(Image.new("1", (4, 4), 1), format="PNG").tolist() == np.full((4, 4, 3), 255).tolist()


TURNS = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: np.swapaxes(a, 0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.swapaxes(a[::-1, ::-1], 0, 1),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_exif_orientation_is_applied_once(orientation: int, kind: str) -> None:
    pixels = noise(4, 6, 3)
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(decode(Image.fromarray(pixels), format=kind, exif=exif), TURNS[orientation](pixels))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_exif_does_not_cost_the_image() -> None:
    pixels = noise(8, 8, 3)
    assert np.array_equal(decode(Image.fromarray(pixels), format="PNG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff"), pixels)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_first_frame_of_several(kind: str, tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "lime")]
    path = tmp_path / f"x.{kind.lower()}"
    more = {"lossless": True} if kind == "WEBP" else {}
    frames[0].save(path, format=kind, save_all=True, append_images=frames[1:], **more)
    pixels, several = decode_file(path, OWN_SIZE)
    assert several
    assert np.array_equal(pixels, np.broadcast_to(np.uint8([255, 0, 0]), (8, 8, 3)))


def test_bomb_is_refused_from_its_header(tmp_path: Path) -> None:
    # The pixel data is missing: had it been looked for, the reason would be another one.
    message = reason(png(30_000, 30_000, 8, 2, b""), tmp_path)
    assert "larger than" in message
    side = 1 + int(MAX_PIXELS**0.5)
    assert f"{side} x {side} is larger than {MAX_PIXELS:,} pixels" == reason(png(side, side, 8, 2, b""), tmp_path)


def test_the_limit_is_our_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # as scripts for large scans do
    assert reason(png(30_000, 30_000, 8, 2, b""), tmp_path).startswith("30000 x 30000 is larger than")


def test_damaged_files_have_reasons(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(noise(64, 64, 3)).save(buffer, format="PNG")
    assert reason(b"", tmp_path) == "empty file"
    assert reason(b"this is text\n", tmp_path) == "not an image of a known format"
    assert reason(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", tmp_path) == "not an image of a known format"
    assert "truncated" in reason(buffer.getvalue()[:3000], tmp_path)
    jpeg = io.BytesIO()
    Image.fromarray(noise(64, 64, 3)).save(jpeg, format="JPEG")
    assert "truncated" in reason(jpeg.getvalue()[: len(jpeg.getvalue()) // 2], tmp_path)
    with pytest.raises(BadImage, match="No such file"):
        decode_file(tmp_path / "absent.png", OWN_SIZE)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow says what it skips in a damaged header
def test_random_damage_never_raises_anything_else(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    for kind in ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"):
        buffer = io.BytesIO()
        Image.fromarray(noise(24, 24, 3)).save(buffer, format=kind)
        for _ in range(40):
            content = bytearray(buffer.getvalue())
            for position in rng.integers(0, min(len(content), 400), 4):
                content[position] = rng.integers(256)
            try:
                pixels, _ = decode_stream(io.BytesIO(bytes(content)), DecodeSettings(8))
            except BadImage as error:
                assert str(error)
            else:
                assert pixels.shape == (8, 8, 3)


def test_center_crop_scales_the_shorter_side_and_crops() -> None:
    wide = np.zeros((40, 100, 3), dtype=np.uint8)
    wide[:, 30:70] = (200, 100, 50)  # exactly the centre square
    pixels = to_pixels(Image.fromarray(wide), DecodeSettings(10))
    assert pixels.shape == (10, 10, 3)
    assert np.array_equal(pixels[:, 3:-3], np.broadcast_to(np.uint8([200, 100, 50]), (10, 4, 3)))
    wide = np.tile(np.linspace(0, 250, 100).astype(np.uint8)[None, :, None], (40, 1, 3))
    pixels = to_pixels(Image.fromarray(wide), DecodeSettings(10))
    resized = np.asarray(Image.fromarray(wide).resize((25, 10), Image.Resampling.LANCZOS))
    # 25 wide: the centre of 10 starts at 7.5, so compare the mean of both neighbours
    both = (resized[:, 7:17].astype(float) + resized[:, 8:18]) / 2
    assert np.abs(pixels - both).max() <= 1


def test_square_of_the_right_side_is_cropped_bit_for_bit() -> None:
    pixels = noise(16, 29, 3)
    assert np.array_equal(to_pixels(Image.fromarray(pixels), DecodeSettings(16)), pixels[:, 6:22])
    square = noise(16, 16, 3)
    assert np.array_equal(to_pixels(Image.fromarray(square), DecodeSettings(16)), square)


def test_stretch_keeps_all_of_the_image() -> None:
    pixels = np.zeros((8, 32, 3), dtype=np.uint8)
    pixels[:, 16:] = 255
    stretched = to_pixels(Image.fromarray(pixels), DecodeSettings(8, center_crop=False))
    assert stretched[:, 0].max() == 0 and stretched[:, -1].min() == 255


def test_shrinking_is_antialiased() -> None:
    checker = ((np.indices((64, 64)).sum(axis=0) % 2) * 255).astype(np.uint8)
    assert np.abs(to_pixels(checker, DecodeSettings(8, channels=1)).astype(int) - 127).max() <= 2


def test_arrays_and_tensors() -> None:
    pixels = noise(6, 5, 3)
    chw = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
    for image in (pixels, chw, chw.float() / 255, pixels.astype(np.float64) / 255, np.moveaxis(pixels, 2, 0)):
        assert np.array_equal(to_pixels(image, OWN_SIZE), pixels)
    grey = pixels[..., 0]
    assert np.array_equal(to_pixels(grey, OWN_SIZE), np.repeat(grey[..., None], 3, axis=2))
    assert np.array_equal(to_pixels(grey[None], DecodeSettings(None, channels=1))[..., 0], grey)
    assert np.array_equal(to_pixels(grey > 99, DecodeSettings(None, channels=1))[..., 0], (grey > 99) * 255)
    assert np.array_equal(to_pixels(grey.astype(np.uint16) * 257, DecodeSettings(None, channels=1))[..., 0], grey)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.full((4, 4, 3), -0.5), "leave out Normalize"),
        (np.full((4, 4, 3), np.nan), "not \\[0, 1\\]"),
        (np.zeros((4, 4, 3), dtype=np.int64), "int64 values"),
        (np.zeros((7, 7, 5), dtype=np.uint8), "1, 3 or 4 channels"),
        (np.zeros(4, dtype=np.uint8), "shape \\(4,\\)"),
        ("a.png", "but str"),
    ],
)
def test_unusable_arrays_have_reasons(image: object, message: str) -> None:
    with pytest.raises(BadImage, match=message):
        to_pixels(image, OWN_SIZE)


def test_unconvertible_modes_are_refused_not_guessed(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 70_000, dtype=np.int32)).save(tmp_path / "i.tif")
    with pytest.raises(BadImage, match="32-bit"):
        decode_file(tmp_path / "i.tif", OWN_SIZE)
    Image.fromarray(np.full((4, 4), 0.5, dtype=np.float32)).save(tmp_path / "f.tif")
    assert decode_file(tmp_path / "f.tif", OWN_SIZE)[0].max() == 128
    lab = ImageCms.applyTransform(
        Image.new("RGB", (4, 4), "red"),
        ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB"),
    )
    assert lab is not None
    lab.save(tmp_path / "lab.tif")
    assert np.abs(decode_file(tmp_path / "lab.tif", OWN_SIZE)[0].astype(int) - (255, 0, 0)).max() <= 8
