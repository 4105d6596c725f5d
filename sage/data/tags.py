"""Captions as lists of tags, the parts between commas, in several random orders."""

import hashlib

_TRIES = 10  # drawn orders for each that is asked for; few tags have few different orders


def tag_orders(text: str, keep: int, orders: int, seed: int) -> list[str]:
    """Return up to `orders` different orders of a caption's tags, the caption itself first; the first `keep` tags stay.

    They depend on the caption and the seed alone. A caption with fewer than two tags to shuffle has one order.
    """
    tags = [tag.strip() for tag in text.split(",") if tag.strip()]
    first, rest = tags[:keep], tags[keep:]
    found = {tuple(rest): text}
    for number in range(_TRIES * orders if len(rest) > 1 else 0):
        if len(found) == orders:
            break
        marks = [hashlib.sha256(f"{seed}:{number}:{place}:{text}".encode()).digest() for place in range(len(rest))]
        shuffled = [tag for _, tag in sorted(zip(marks, rest, strict=True))]
        found.setdefault(tuple(shuffled), ", ".join(first + shuffled))
    return list(found.values())
