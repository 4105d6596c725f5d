"""What becomes of every kind of picture file: accepted and how, or the exact reason why not."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from image_files import GREEN, RED, REJECTED, drawing, encoded, grey_tiff, noise, png, rejected_file
from PIL import Image

from sage.data.images import compose, decode, is_blank, pixel_hash
from sage.data.rows import Rejected


@pytest.mark.parametrize("name", REJECTED)
def test_a_bad_picture_gets_its_exact_reason(name: str) -> None:
    data, reason = rejected_file(name), REJECTED[name][1]
    details = set()
    for _ in range(2):
        with pytest.raises(Rejected) as rejected:
            decode(data)
        assert rejected.value.reason == reason, rejected.value.detail
        details.add(rejected.value.detail)
    assert len(details) == 1  # no address in memory, no time


@pytest.mark.parametrize(("width", "height"), [(8, 8), (8, 64), (64, 8), (10_000, 5_000)])
def test_the_limits_themselves_are_accepted(width: int, height: int) -> None:
    assert decode(encoded(Image.new("1", (width, height)), "PNG")).image.size == (width, height)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"])
def test_every_accepted_format_looks_the_same(kind: str) -> None:
    options = {"quality": 100, "subsampling": 0} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
    decoded = decode(encoded(drawing(), kind, **options))
    pixels = np.asarray(decoded.image.convert("RGB")).astype(int)
    assert np.abs(pixels - np.asarray(drawing())).max() <= 3
    assert not decoded.animated


def palette_with_alpha() -> Image.Image:
    image = Image.new("P", (16, 16), 0)
    image.putpalette([*RED, *GREEN])
    image.paste(1, (8, 0, 16, 16))
    return image


@pytest.mark.parametrize(
    ("data", "mode", "left", "right"),
    [
        (encoded(palette_with_alpha(), "PNG", transparency=0), "P", (255, 255, 255), GREEN),
        (encoded(palette_with_alpha(), "PNG", transparency=b"\x80\xff"), "P", (255, 127, 127), GREEN),
        (encoded(Image.new("LA", (16, 16), (0, 128)), "PNG"), "LA", (127, 127, 127), (127, 127, 127)),
        (encoded(Image.new("RGBA", (16, 16), (0, 0, 0, 0)), "PNG"), "RGBA", (255, 255, 255), (255, 255, 255)),
        (encoded(Image.new("1", (16, 16), 1), "PNG"), "1", (255, 255, 255), (255, 255, 255)),
        (encoded(Image.new("L", (16, 16), 7), "PNG"), "L", (7, 7, 7), (7, 7, 7)),
        (encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "TIFF"), "CMYK", RED, RED),
        (encoded(Image.new("CMYK", (16, 16), (255, 0, 255, 0)), "JPEG", quality=100), "CMYK", GREEN, GREEN),
    ],
)
def test_every_mode_becomes_rgb_over_white(
    data: bytes, mode: str, left: tuple[int, ...], right: tuple[int, ...]
) -> None:
    decoded = decode(data)
    assert decoded.mode == mode
    square = np.asarray(compose(decoded.image, (16, 16), "pad")).astype(int)
    assert square.shape == (16, 16, 3)
    assert np.abs(square[8, 2] - left).max() <= 2
    assert np.abs(square[8, 13] - right).max() <= 2


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_and_never_clipped(kind: str) -> None:
    samples = np.linspace(0, 65535, 256, dtype=np.uint16).reshape(16, 16)
    decoded = decode(encoded(Image.fromarray(samples), kind))
    assert decoded.mode.startswith("I;16")
    square = np.asarray(compose(decoded.image, (16, 16), "pad"))[..., 0]
    assert np.array_equal(square, np.round(samples / 257).astype(np.uint8))


def test_16_bit_colour_keeps_its_upper_byte() -> None:
    values = np.linspace(0, 65535, 16 * 16 * 3, dtype=np.uint16).reshape(16, 16, 3)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    square = np.asarray(compose(decode(png(16, 16, 16, 2, rows)).image, (16, 16), "pad")).astype(int)
    assert np.abs(square - values / 257).max() <= 1


@pytest.mark.parametrize("white_is_zero", [False, True])
@pytest.mark.parametrize("bits", [8, 12, 16])
def test_a_grey_tiff_is_the_same_in_every_depth_and_polarity(bits: int, white_is_zero: bool) -> None:
    ramp, top = np.tile(np.arange(0, 256, 4), (64, 1)), 2**bits - 1
    samples = ramp * top // 255
    data = grey_tiff(top - samples if white_is_zero else samples, bits, white_is_zero)
    if bits == 12 and white_is_zero:
        with pytest.raises(Rejected, match="decode_error"):  # Pillow does not read it
            decode(data)
        return
    square = np.asarray(compose(decode(data).image, (64, 64), "pad"))[..., 0].astype(int)
    assert np.abs(square - ramp).max() <= 1


@pytest.mark.parametrize("level", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("depth", "colour"), [(1, 0), (2, 0), (4, 0), (8, 0), (16, 0), (8, 2), (16, 2)])
def test_the_clear_colour_of_a_png_is_white_in_every_depth(depth: int, colour: int, level: float) -> None:
    top = 2**depth - 1
    clear, other = round(level * top), round((1 - level) * top) if depth > 1 else 1 - round(level)
    samples = np.repeat(np.where(np.arange(16) < 8, clear, other), 3 if colour else 1)
    bits = "".join(f"{sample:0{depth}b}" for sample in samples)
    row = b"\0" + int(bits, 2).to_bytes(len(bits) // 8, "big")
    data = png(16, 16, depth, colour, row * 16, clear.to_bytes(2, "big") * (3 if colour else 1))
    square = np.asarray(compose(decode(data).image, (16, 16), "pad")).astype(int)
    assert (square[8, 2] == 255).all()
    assert np.abs(square[8, 13] - other / top * 255).max() <= 1


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_exif_orientation_is_applied_once(kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by a quarter: what is left comes to the top
    options = {} if kind == "TIFF" else {"quality": 100}
    image = decode(encoded(drawing(), kind, exif=exif, **options)).image.convert("RGB")
    assert image.size == (16, 32)
    top, bottom = image.getpixel((8, 4)), image.getpixel((8, 28))
    assert top[0] > 200 > 60 > top[1]
    assert bottom[1] > 200 > 60 > bottom[0]
    square = np.asarray(compose(image, (32, 32), "pad"))
    assert square[4, 16, 0] > 200 > square[28, 16, 0]


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_an_animation_the_first_frame_is_taken(kind: str) -> None:
    others = [Image.new("RGB", (16, 16), colour) for colour in (GREEN, (0, 0, 255))]
    data = encoded(Image.new("RGB", (16, 16), RED), kind, save_all=True, append_images=others)
    decoded = decode(data)
    assert decoded.animated
    assert np.abs(np.asarray(decoded.image.convert("RGB")).astype(int) - RED).max() <= 2


WHOLE = {kind: encoded(noise(), kind) for kind in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF")}


@given(st.sampled_from(sorted(WHOLE)), st.lists(st.tuples(st.integers(0, 300), st.integers(0, 255)), max_size=4))
def test_damage_is_rejected_or_harmless_but_never_an_error(kind: str, flips: list[tuple[int, int]]) -> None:
    data = bytearray(WHOLE[kind])
    for place, value in flips:
        data[place % len(data)] = value
    try:
        decoded = decode(bytes(data))
    except Rejected as rejected:
        assert rejected.reason in {"decode_error", "format_not_allowed", "too_large", "too_small", "aspect"}
    else:
        assert compose(decoded.image, (8, 8), "pad").size == (8, 8)


@pytest.mark.parametrize(
    ("size", "inner"), [((100, 50), (32, 16)), ((16, 16), (32, 32)), ((8, 64), (4, 32)), ((32, 32), (32, 32))]
)
def test_compose_fills_the_square_and_centres(size: tuple[int, int], inner: tuple[int, int]) -> None:
    square = np.asarray(compose(Image.new("RGB", size, (0, 0, 0)), (32, 32), "pad"))
    dark = np.argwhere(square[..., 0] < 128)
    (top, left), (bottom, right) = dark.min(0), dark.max(0)
    assert (right - left + 1, bottom - top + 1) == inner
    assert (left, top) == ((32 - inner[0]) // 2, (32 - inner[1]) // 2)


def striped(width: int, height: int) -> Image.Image:
    """A picture whose red says how far to the right a pixel lies, and whose green how far down."""
    along, down = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([along, down, np.zeros_like(along)], 2).round().astype(np.uint8))


@pytest.mark.parametrize(("width", "height"), [(200, 100), (100, 200), (64, 64), (97, 131), (8, 64)])
@pytest.mark.parametrize("target", [(32, 32), (24, 48)])
def test_cropping_takes_the_largest_centred_part_of_the_shape(width: int, height: int, target: tuple[int, int]) -> None:
    found = np.asarray(compose(striped(width, height), target, "crop")).astype(float)
    assert found.shape[:2] == target
    across, down = (
        min(width, height * target[1] / target[0]) / width,
        min(height, width * target[0] / target[1]) / height,
    )
    for channel, part, axis in ((0, across, 1), (1, down, 0)):
        seen = found[..., channel].mean(1 - axis)
        # Half of what is cut off, in shades, at each end; the first pixel's middle lies half a pixel within.
        assert seen[0] == pytest.approx(255 * ((1 - part) / 2 + part / target[axis] / 2), abs=6)
        assert seen[-1] == pytest.approx(255 * (1 - (1 - part) / 2 - part / target[axis] / 2), abs=6)
    assert (found[..., 2] == 0).all()  # no white


@pytest.mark.parametrize("size", [8, 31, 64, 72, 300])
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_a_picture_of_the_right_shape_is_the_same_cropped_and_padded(size: int, mode: str) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size, size, len(mode)), dtype=np.uint8))
    assert compose(image, (64, 64), "crop").tobytes() == compose(image, (64, 64), "pad").tobytes()


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "1"])
def test_an_image_of_one_colour_is_blank_and_one_other_pixel_is_enough(mode: str) -> None:
    image = Image.new(mode, (16, 16), 0)
    assert is_blank(image)
    image.putpixel((15, 15), (0, 0, 1, 0) if mode == "RGBA" else (0, 0, 1) if mode == "RGB" else 255)
    assert not is_blank(image)


def test_pixel_hash_sees_pixels_only() -> None:
    image = drawing()
    assert pixel_hash(image) == pixel_hash(image.convert("RGBA"))
    assert pixel_hash(image) == pixel_hash(decode(encoded(image, "BMP")).image)
    other = image.copy()
    other.putpixel((0, 0), (254, 0, 0))
    assert pixel_hash(image) != pixel_hash(other)
