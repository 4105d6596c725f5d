"""Image files of every kind, good and bad, for tests of what reads them."""

import struct
import zlib
from collections.abc import Callable
from functools import cache
from io import BytesIO

import numpy as np
from PIL import Image

RED, GREEN = (255, 0, 0), (0, 255, 0)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def drawing() -> Image.Image:
    """32x16, red on the left, green on the right."""
    image = Image.new("RGB", (32, 16), RED)
    image.paste(GREEN, (16, 0, 32, 16))
    return image


def png(width: int, height: int, depth: int, colour: int, rows: bytes, clear: bytes = b"") -> bytes:
    """Return a PNG written by hand: of kinds that Pillow reads but does not write; `clear` names its clear colour."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    before = chunk(b"IHDR", header) + (chunk(b"tRNS", clear) if clear else b"")
    return b"\x89PNG\r\n\x1a\n" + before + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def grey_tiff(samples: np.ndarray, bits: int, white_is_zero: bool) -> bytes:
    """Return a grey TIFF written by hand; `samples` are of `bits` bits, 12-bit ones are packed in pairs."""
    height, width = samples.shape
    if bits == 12:
        first, second = samples.reshape(-1, 2).T
        data = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], 1).astype(np.uint8).tobytes()
    else:
        data = samples.astype(f"<u{bits // 8}").tobytes()
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: int(not white_is_zero), 273: 8, 277: 1, 278: height}
    tags[279] = len(data)
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", tag, 4, 1, n) for tag, n in tags.items())
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + directory + bytes(4)


def text_bomb() -> bytes:
    """Return a small PNG with a compressed comment of 20 MB."""
    data = b"Comment\0\0" + zlib.compress(b"\0" * 20_000_000)
    comment = struct.pack(">I", len(data)) + b"zTXt" + data + struct.pack(">I", zlib.crc32(b"zTXt" + data))
    whole = encoded(drawing(), "PNG")
    return whole[:33] + comment + whole[33:]


def noise() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


REJECTED: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "decode_error"),
    "text": (lambda: b"this is no picture", "decode_error"),
    "zeros": (lambda: bytes(100), "decode_error"),
    "truncated JPEG": (lambda: cut(encoded(noise(), "JPEG")), "decode_error"),
    "truncated PNG": (lambda: cut(encoded(noise(), "PNG")), "decode_error"),
    "truncated GIF": (lambda: cut(encoded(noise(), "GIF")), "decode_error"),
    "truncated WebP": (lambda: cut(encoded(noise(), "WEBP")), "decode_error"),
    "truncated BMP": (lambda: cut(encoded(noise(), "BMP")), "decode_error"),
    "truncated TIFF": (lambda: cut(encoded(noise(), "TIFF")), "decode_error"),
    "PNG magic only": (lambda: b"\x89PNG\r\n\x1a\n", "decode_error"),
    "JPEG magic only": (lambda: b"\xff\xd8\xff", "decode_error"),
    "PNG with a bit flipped": (lambda: encoded(noise(), "PNG").replace(b"IDAT", b"IDAU"), "decode_error"),
    "RIFF of sound": (lambda: b"RIFF\x24\0\0\0WAVEfmt ", "decode_error"),
    "compressed comment": (text_bomb, "decode_error"),
    "EPS": (lambda: encoded(drawing(), "EPS"), "format_not_allowed"),
    "PSD": (lambda: b"8BPS\0\1" + bytes(40), "format_not_allowed"),
    "FITS": (lambda: b"SIMPLE  =                    T".ljust(2880), "format_not_allowed"),
    "SVG": (lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>", "format_not_allowed"),
    "SVG with declaration": (lambda: b"<?xml version='1.0'?><svg/>", "format_not_allowed"),
    "HTML": (lambda: b"<!DOCTYPE html><p>404</p>", "format_not_allowed"),
    "PDF": (lambda: encoded(drawing(), "PDF"), "format_not_allowed"),
    "ICO": (lambda: encoded(drawing(), "ICO"), "format_not_allowed"),
    "PPM": (lambda: encoded(drawing(), "PPM"), "format_not_allowed"),
    "HEIC": (lambda: b"\0\0\0\x18ftypheic" + bytes(12), "format_not_allowed"),
    "ZIP": (lambda: b"PK\3\4" + bytes(26), "format_not_allowed"),
    "32-bit float TIFF": (lambda: encoded(Image.new("F", (16, 16)), "TIFF"), "format_not_allowed"),
    "32-bit integer TIFF": (lambda: encoded(Image.new("I", (16, 16)), "TIFF"), "format_not_allowed"),
    "bomb": (lambda: encoded(Image.new("1", (10_000, 10_000)), "PNG"), "too_large"),
    # No pixel is there: only who looks at the header first can say that there would be too many.
    "bomb without pixels": (lambda: png(10_000, 8_000, 8, 2, b""), "too_large"),
    "bomb that Pillow refuses": (lambda: png(60_000, 60_000, 8, 2, b""), "too_large"),
    "bomb of a GIF frame": (
        lambda: b"GIF89a\x10\0\x10\0\0\0\0,\0\0\0\0\xff\xff\xff\xff\0\2\2D\1\0;",
        "too_large",
    ),
    "1x1": (lambda: encoded(Image.new("RGB", (1, 1)), "PNG"), "too_small"),
    "7x20": (lambda: encoded(Image.new("RGB", (7, 20)), "PNG"), "too_small"),
    "20000x4": (lambda: encoded(Image.new("RGB", (20_000, 4)), "PNG"), "aspect"),
    "8x65": (lambda: encoded(Image.new("RGB", (8, 65)), "PNG"), "aspect"),
}


@cache
def rejected_file(name: str) -> bytes:
    return REJECTED[name][0]()
