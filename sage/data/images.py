"""Pictures as they come: what is accepted, and how it becomes a square of RGB."""

import hashlib
import warnings
from dataclasses import dataclass
from io import BytesIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from sage.data.rows import Rejected

MAX_PIXELS = 50_000_000
MIN_SIDE = 8
MAX_ASPECT = 8

# A file is what its first bytes say, whatever its name; only these decoders ever run.
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
# Known to be something else (offset, bytes), so that the reason is "not this format" and not "damaged".
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
    *((0, b"P%d%s" % (kind, space)) for kind in range(1, 8) for space in (b"\n", b" ")),
    (0, b"II+\0"),
    (0, b"MM\0+"),
    (4, b"ftyp"),
)
_DIRECT_MODES = {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr"}


@dataclass(frozen=True)
class Decoded:
    """A picture, upright, with the mode its file had and whether it was the first of several frames."""

    picture: Image.Image
    mode: str
    animated: bool


def decode(data: bytes) -> Decoded:
    """Return the (first) picture of a file's bytes with its EXIF orientation applied.

    Raises Rejected: `format_not_allowed`, `too_large`, `aspect`, `too_small`, `decode_error`. Sizes are checked on the
    header, before any pixel is decoded.
    """
    kind = _format(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what Pillow finds odd but reads is kept; its limit of pixels lies above ours
        try:
            picture = Image.open(BytesIO(data), formats=[kind])
            _check_size(*picture.size)
            mode, animated = picture.mode, bool(getattr(picture, "is_animated", False))
            if mode not in _DIRECT_MODES and not mode.startswith("I;16"):
                raise Rejected("format_not_allowed", f"samples of mode {mode} have no stated white")
            picture.load()
            ImageOps.exif_transpose(picture, in_place=True)
            return Decoded(picture, mode, animated)
        except Rejected:
            raise
        except Image.DecompressionBombError as error:
            raise Rejected("too_large", str(error)) from error
        except UnidentifiedImageError as error:
            # Its message holds an address in memory, which differs from run to run.
            raise Rejected("decode_error", f"the {kind} header cannot be read") from error
        except Exception as error:
            # Damaged bytes make Pillow's decoders raise nearly anything, from struct.error to SyntaxError.
            raise Rejected("decode_error", f"{type(error).__name__}: {error}") from error


def _format(data: bytes) -> str:
    for magic, kind in _ACCEPTED.items():
        if data.startswith(magic) and (kind != "WEBP" or data[8:12] == b"WEBP"):
            return kind
    if any(data.startswith(magic, offset) for offset, magic in _FOREIGN):
        raise Rejected(
            "format_not_allowed",
            f"it begins with {data[:12]!r}; allowed are {', '.join(sorted({*_ACCEPTED.values()}))}",
        )
    raise Rejected(
        "decode_error", "the file is empty" if not data else f"it begins with {data[:12]!r}, which is no picture"
    )


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise Rejected("too_large", f"{width}x{height} pixels, above {MAX_PIXELS}")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise Rejected("aspect", f"{width}x{height}, above {MAX_ASPECT} to 1")
    if min(width, height) < MIN_SIDE:
        raise Rejected("too_small", f"{width}x{height}, a side below {MIN_SIDE}")


def compose(picture: Image.Image, size: int) -> Image.Image:
    """Return the picture over white as RGB, its larger side scaled to `size`, centred on a white square.

    16-bit grey is divided by 257 and never clipped; of 16-bit colour Pillow itself keeps the upper byte.
    """
    rgba = _eight_bit(picture).convert("RGBA")
    scale = size / max(rgba.size)
    sides = (max(1, round(rgba.width * scale)), max(1, round(rgba.height * scale)))
    rgba = rgba.resize(sides, Image.Resampling.LANCZOS, reducing_gap=2.0)
    square = Image.new("RGBA", (size, size), "white")
    square.alpha_composite(rgba, ((size - rgba.width) // 2, (size - rgba.height) // 2))
    return square.convert("RGB")


def _eight_bit(picture: Image.Image) -> Image.Image:
    if not picture.mode.startswith("I;16"):
        return picture
    samples = np.asarray(picture).astype(np.uint32)
    return Image.fromarray(((samples + 128) // 257).astype(np.uint8))


def pixel_hash(picture: Image.Image) -> str:
    """Return the SHA-256 of the pixels, the same whatever file they came from."""
    return hashlib.sha256(np.asarray(picture.convert("RGB")).tobytes()).hexdigest()
