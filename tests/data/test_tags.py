"""Tags in other orders: the same tags, the first ones in place, and always the same orders."""

from hypothesis import given
from hypothesis import strategies as st

from sage.data.tags import tag_orders

tags = st.lists(st.text("abcdef ", min_size=1).map(str.strip).filter(bool), max_size=8)


def split(text: str) -> list[str]:
    return [tag.strip() for tag in text.split(",") if tag.strip()]


@given(tags, st.integers(0, 4), st.integers(2, 12), st.integers(0, 3))
def test_orders_have_the_same_tags_and_keep_the_first(found: list[str], keep: int, orders: int, seed: int) -> None:
    text = ", ".join(found)
    drawn = tag_orders(text, keep, orders, seed)
    assert drawn[0] == text
    assert 1 <= len(drawn) <= orders
    assert len(set(drawn)) == len(drawn)
    assert drawn == tag_orders(text, keep, orders, seed)
    for other in drawn:
        assert split(other)[:keep] == found[:keep]
        assert sorted(split(other)) == sorted(found)


def test_every_tag_but_the_kept_comes_to_every_place() -> None:
    drawn = [split(text) for text in tag_orders("a, b, c, d", 1, 60, 0)]
    assert {order[0] for order in drawn} == {"a"}
    assert all({order[place] for order in drawn} == {"b", "c", "d"} for place in (1, 2, 3))
    assert tag_orders("a, b, c, d", 1, 60, 1)[1:] != tag_orders("a, b, c, d", 1, 60, 0)[1:]


def test_few_tags_have_all_their_orders_and_spaces_make_none() -> None:
    assert sorted(tag_orders("a, b, c", 0, 6, 0)) == sorted(
        ["a, b, c", "a, c, b", "b, a, c", "b, c, a", "c, a, b", "c, b, a"]
    )
    assert tag_orders("a,b", 0, 8, 0) == ["a,b", "b, a"]
    assert tag_orders("a, a, a", 0, 8, 0) == ["a, a, a"]


def test_a_caption_without_tags_to_shuffle_stays_as_it_is() -> None:
    for text in ("a sentence without commas", "one, two", "trailing,", ""):
        assert tag_orders(text, 1, 8, 0) == [text]
