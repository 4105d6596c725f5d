"""Decoding image files of untrusted origin, and scaling them to RGB images of one size."""

import hashlib
import warnings
from dataclasses import dataclass
from io import BytesIO
from typing import Literal

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from sage.data.rows import Rejected

Resize = Literal["pad", "crop"]

MAX_PIXELS = 50_000_000
MIN_SIDE = 8
MAX_ASPECT = 8

# The first bytes of a file decide its format, not its name; only these decoders ever run.
_ACCEPTED = {
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"\xff\xd8\xff": "JPEG",
    b"GIF87a": "GIF",
    b"GIF89a": "GIF",
    b"RIFF": "WEBP",
    b"BM": "BMP",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
}
# (offset, bytes) of formats that are rejected as not allowed; other unknown bytes are rejected as damaged.
_FOREIGN = (
    *(
        (0, magic)
        for magic in (b"%!PS", b"\xc5\xd0\xd3\xc6", b"%PDF", b"8BPS", b"SIMPLE  =", b"<svg", b"<?xml", b"<!DOCTYPE")
    ),
    *(
        (0, magic)
        for magic in (
            b"\0\0\1\0",
            b"icns",
            b"DDS ",
            b"\0\0\0\x0cjP  ",
            b"\xff\x4f\xff\x51",
            b"qoif",
            b"\x1f\x8b",
            b"PK\3\4",
        )
    ),
    *((0, b"P%d%s" % (kind, space)) for kind in range(1, 8) for space in (b"\n", b" ", b"\r", b"\t", b"#")),
    *((0, b"P%s\n" % kind) for kind in (b"F", b"f")),
    *((0, magic) for magic in (b"\0\0\0\x0cJXL ", b"\xff\x0a", b"#?RADIANCE", b"v/1\1", b"gimp xcf", b"AT&TFORM")),
    (0, b"II+\0"),
    (0, b"MM\0+"),
    (4, b"ftyp"),
)
_TGA = b"TRUEVISION-XFILE.\0"  # at the end of a Targa image, whose beginning has no mark
_BITS, _PHOTOMETRIC = 258, 262  # tags of a TIFF
_DIRECT_MODES = {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr"}


@dataclass(frozen=True)
class Decoded:
    """A decoded image, upright, of 8-bit samples; the mode of its file; whether it is the first frame of several."""

    image: Image.Image
    mode: str
    animated: bool


def decode(data: bytes) -> Decoded:
    """Decode the (first) image in the bytes of a file and apply its EXIF orientation.

    Raises Rejected with `format_not_allowed`, `too_large`, `aspect`, `too_small` or `decode_error`. The size is checked
    in the header, before any pixel is decoded.
    """
    kind = _format(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # readable files are kept despite warnings; Pillow's pixel limit is above ours
        try:
            image = Image.open(BytesIO(data), formats=[kind])
            _check_size(*image.size)
            mode, animated = image.mode, bool(getattr(image, "is_animated", False))
            if mode not in _DIRECT_MODES and not mode.startswith("I;16"):
                raise Rejected("format_not_allowed", f"pixels of mode {mode} have no defined white level")
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            depth = data[24] if kind == "PNG" else 8
            return Decoded(_eight_bit(image, depth), mode, animated)
        except Rejected:
            raise
        except Image.DecompressionBombError as error:
            raise Rejected("too_large", str(error)) from error
        except UnidentifiedImageError as error:
            # Pillow's message holds a memory address, which differs from run to run.
            raise Rejected("decode_error", f"the {kind} header is damaged, or of a kind that is not read") from error
        except Exception as error:
            # On damaged bytes Pillow's decoders raise many types, from struct.error to SyntaxError.
            raise Rejected("decode_error", f"{type(error).__name__}: {error}") from error


def is_image(first: bytes) -> bool:
    """Return whether the first bytes of a file, 12 or more, are those of a known format, also of one not allowed."""
    return _accepted(first) is not None or _is_foreign(first)


def _accepted(data: bytes) -> str | None:
    for magic, kind in _ACCEPTED.items():
        if data.startswith(magic) and (kind != "WEBP" or data[8:12] == b"WEBP"):
            return kind
    return None


def _is_foreign(data: bytes) -> bool:
    return any(data.startswith(magic, offset) for offset, magic in _FOREIGN) or data.endswith(_TGA)


def _format(data: bytes) -> str:
    if kind := _accepted(data):
        return kind
    if _is_foreign(data):
        raise Rejected(
            "format_not_allowed",
            f"it begins with {data[:12]!r}; allowed are {', '.join(sorted({*_ACCEPTED.values()}))}",
        )
    detail = f"it begins with {data[:12]!r}, which is no known image format" if data else "the file is empty"
    raise Rejected("decode_error", detail)


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise Rejected("too_large", f"{width}x{height} is more than {MAX_PIXELS} pixels")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise Rejected("aspect", f"{width}x{height} has an aspect ratio above {MAX_ASPECT} to 1")
    if min(width, height) < MIN_SIDE:
        raise Rejected("too_small", f"{width}x{height} has a side below {MIN_SIDE} pixels")


def compose(image: Image.Image, size: tuple[int, int], resize: Resize) -> Image.Image:
    """Return the image as RGB of this size (height, width), scaled with Lanczos and centred.

    "pad": the whole image, with white beside it if its shape is another; "crop": the largest part of that shape.
    Transparency is composited over white.
    """
    height, width = size
    rgba = image.convert("RGBA")
    if resize == "crop":
        # In this order, because an image of the same shape is then not cropped by a rounding error.
        across, along = min(rgba.width, rgba.height * width / height), min(rgba.height, rgba.width * height / width)
        left, top = (rgba.width - across) / 2, (rgba.height - along) / 2
        sides, box = (width, height), (left, top, left + across, top + along)
    else:
        scale = min(height / rgba.height, width / rgba.width)
        sides = (max(1, round(rgba.width * scale)), max(1, round(rgba.height * scale)))
        box = (0, 0, *rgba.size)
    rgba = rgba.resize(sides, Image.Resampling.LANCZOS, box=box, reducing_gap=2.0)
    canvas = Image.new("RGBA", (width, height), "white")
    canvas.alpha_composite(rgba, ((width - rgba.width) // 2, (height - rgba.height) // 2))
    return canvas.convert("RGB")


def _eight_bit(image: Image.Image, depth: int) -> Image.Image:
    """Return a loaded image with 8-bit samples, in which white is the largest; `depth` is a PNG's bits per sample.

    16-bit grey is scaled by 1 / 257, not clipped; Pillow reads 16-bit colour as its upper byte.
    """
    clear = image.info.get("transparency")
    if image.mode.startswith("I;16"):
        return _grey_of_16_bits(image, clear)
    # The file names its transparent colour in samples of its own depth, and Pillow leaves it so.
    if depth == 16 and isinstance(clear, tuple):
        image.info["transparency"] = tuple(sample >> 8 for sample in clear)
    elif depth in (2, 4) and isinstance(clear, int) and image.mode == "L":
        image.info["transparency"] = clear * 255 // (2**depth - 1)
    return image


def _grey_of_16_bits(image: Image.Image, clear: object) -> Image.Image:
    samples, tags = np.asarray(image).astype(np.uint32), getattr(image, "tag_v2", {})
    if tags.get(_BITS) == (12,):
        samples = (samples * 65535 + 2047) // 4095
    if tags.get(_PHOTOMETRIC) == 0:  # white is zero; Pillow inverts the samples of up to 8 bits only
        samples = 65535 - samples
    grey = Image.fromarray(((samples + 128) // 257).astype(np.uint8))
    if clear is not None:
        grey.putalpha(Image.fromarray(np.where(samples == clear, 0, 255).astype(np.uint8)))
    return grey


def is_blank(image: Image.Image) -> bool:
    """Return whether all pixels are equal, as in images of an overflow and those that a safety checker removed."""
    pixels = np.asarray(image.convert("RGB"))
    return bool((pixels == pixels[0, 0]).all())


def pixel_hash(image: Image.Image) -> str:
    """Return the SHA-256 of the RGB pixels, which does not depend on the file format."""
    return hashlib.sha256(np.asarray(image.convert("RGB")).tobytes()).hexdigest()
