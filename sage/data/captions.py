"""Checking and cleaning captions."""

import re
import unicodedata

from sage.data.rows import Rejected

# Invisible format characters: soft hyphen, zero-width space, directional marks and overrides, word joiner, byte-order
# mark, annotations. The zero-width joiner and non-joiner stay, because emoji, Persian and Indic scripts need them.
_INVISIBLE = re.compile(
    "[\u00ad\u061c\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u206f\ufeff\ufff9-\ufffb]"
)


def clean_caption(text: object) -> str:
    """Return a caption in Unicode NFC, without control and invisible characters, words separated by single spaces.

    Raises Rejected with `no_caption` if it is not text or has no visible character, with `bad_text` if it contains a
    NUL or a lone surrogate.
    """
    if not isinstance(text, str):
        raise Rejected("no_caption", f"the caption is {'missing' if text is None else type(text).__name__}, not text")
    if broken := re.search("[\0\ud800-\udfff]", text):
        raise Rejected("bad_text", f"the caption has U+{ord(broken[0]):04X} at {broken.start()}")
    visible = "".join(
        character
        for character in _INVISIBLE.sub("", text)
        if character.isspace() or unicodedata.category(character) != "Cc"
    )
    words = " ".join(unicodedata.normalize("NFC", visible).split())
    if not any(unicodedata.category(character)[0] in "LNPS" for character in words):
        raise Rejected("no_caption", "the caption has no visible character")
    return words
