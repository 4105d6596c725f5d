import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sage.data.captions import clean_caption
from sage.data.rows import Rejected


@pytest.mark.parametrize(
    "text",
    [
        "a red apple",
        "ein grüner Apfel",
        "una niña con un melón",
        "un cœur brisé",
        "яблоко",
        "μήλο",
        "תפוח אדום",
        "تفاحة حمراء",
        "می‌خواهم",  # Persian, spelt with a zero-width non-joiner
        "लाल सेब",
        "แอปเปิ้ลแดง",
        "红苹果",
        "赤いリンゴ",
        "빨간 사과",
        "👩🏽‍🚀",  # joined with a zero-width joiner
        "🏴󠁧󠁢󠁥󠁮󠁧󠁿",  # spelt with tag characters
        "<script>alert(1)</script>",
        "50 % of 3 €",
        "x" * 50_000,
    ],
)
def test_captions_of_any_language_stay_as_they_are(text: str) -> None:
    assert clean_caption(text) == unicodedata.normalize("NFC", text)


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("  a\tb\r\nc \u00a0 d\u2028e\u3000f ", "a b c d e f"),
        ("cafe\u0301", "caf\u00e9"),
        ("\ufeffa cat", "a cat"),
        ("a\x07b\x1b[31mc\x7f\x9b", "ab[31mc"),
        ("user\u202etxt.exe\u202c", "usertxt.exe"),
        ("\u2067a\u2069 \u200eb\u200f \u061cc", "a b c"),
        ("ze\u200bro\u2060wid\u00adth", "zerowidth"),
        ("e\u200b\u0301", "\u00e9"),  # composed only once the space between is gone
    ],
)
def test_what_cannot_be_seen_goes(text: str, kept: str) -> None:
    assert clean_caption(text) == kept


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "no_caption"),
        (float("nan"), "no_caption"),
        (["a", "b"], "no_caption"),
        ({"en": "a"}, "no_caption"),
        (3, "no_caption"),
        (True, "no_caption"),
        ("", "no_caption"),
        (" \t\r\n\u3000", "no_caption"),
        ("\u200b\ufeff", "no_caption"),
        ("\u200d", "no_caption"),
        ("\u0301", "no_caption"),
        ("a\0b", "bad_text"),
        ("half \ud83d", "bad_text"),
        ("\udc80 half", "bad_text"),
        ("\0", "bad_text"),
    ],
)
def test_what_is_no_caption_is_rejected(text: object, reason: str) -> None:
    with pytest.raises(Rejected) as rejected:
        clean_caption(text)
    assert rejected.value.reason == reason


@given(st.text())
def test_a_kept_caption_is_clean_and_stays_as_it_is(text: str) -> None:
    try:
        kept = clean_caption(text)
    except Rejected:
        return
    assert clean_caption(kept) == kept == unicodedata.normalize("NFC", kept)
    assert len(kept.splitlines()) == 1
    assert not {unicodedata.category(character) for character in kept} & {"Cc", "Cs"}
    kept.encode("utf-8")
