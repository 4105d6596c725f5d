"""Pairs of prompts that differ although their words are alike, in several wordings, and pairs that do not differ."""

_THINGS = [("cube", "ball"), ("cup", "plate"), ("car", "house"), ("chair", "table"), ("bird", "tree")]
_COLOURS = [("red", "blue"), ("green", "yellow"), ("black", "white"), ("pink", "orange")]
_ACTORS = [("dog", "cat"), ("boy", "girl"), ("robot", "astronaut"), ("horse", "farmer"), ("king", "wizard")]
_ABSENT = ["cars", "people", "trees", "clouds", "snow"]
_PLACES = ["a street", "a beach", "a mountain village"]
_COUNTED = ["dogs", "apples", "balloons", "soldiers"]
_NAMES = [("Anna", "Maria"), ("Einstein", "Newton"), ("Paris", "Rome"), ("Tokyo", "Cairo"), ("Venus", "Mars")]

Pairs = list[tuple[str, str]]

CONFUSED: dict[str, Pairs] = {
    "attributes exchanged": [
        (pattern.format(a=a, b=b, c=c, d=d), pattern.format(a=b, b=a, c=c, d=d))
        for pattern in (
            "a {a} {c} on a {b} {d}",
            "a {c} in {a} beside a {d} in {b}",
            "photo of a {a} {c} and a {b} {d}",
        )
        for a, b in _COLOURS
        for c, d in _THINGS
    ],
    "roles exchanged": [
        (pattern.format(a=a, b=b), pattern.format(a=b, b=a))
        for pattern in (
            "a {a} chases a {b}",
            "a {a} is carried by a {b}",
            "a {a} to the left of a {b}",
            "a {a} feeding a {b}",
        )
        for a, b in _ACTORS
    ],
    "negation": [
        (f"{place} with {thing}", pattern.format(place=place, thing=thing))
        for pattern in ("{place} without {thing}", "{place} with no {thing}", "{place}, there are not any {thing}")
        for place in _PLACES
        for thing in _ABSENT
    ],
    "counting": [
        (pattern.format(n=n, thing=thing), pattern.format(n=m, thing=thing))
        for pattern in ("{n} {thing}", "a drawing of {n} {thing} in a row", "exactly {n} {thing} on a lawn")
        for n, m in (("two", "three"), ("four", "seven"), ("3", "5"))
        for thing in _COUNTED
    ],
    "colours": [
        (pattern.format(a=a, c=c), pattern.format(a=b, c=c))
        for pattern in ("a {a} {c}", "a {c}, painted {a}, in the sun")
        for a, b in _COLOURS
        for c, _ in _THINGS
    ],
    "proper names": [
        (pattern.format(a), pattern.format(b))
        for pattern in ("a portrait of {}", "a statue of {} in a museum", "an old map that shows {}", "the story of {}")
        for a, b in _NAMES
    ],
}

SAME: Pairs = [
    (first.format(a=a, c=c, d=d), second.format(a=a, c=c, d=d))
    for first, second in (
        ("a {a} {c} on a {d}", "a {d} with a {a} {c} on it"),
        ("photo of a {a} {c}", "a {a} {c}, photograph"),
        ("a {c} beside a {d}", "a {c} next to a {d}"),
        ("a small {a} {c}", "a tiny {a} {c}"),
    )
    for a, _ in _COLOURS
    for c, d in _THINGS
]

MOVED: Pairs = [
    (first.format(a=a, c=c, d=d), second.format(a=a, c=c, d=d))
    for first, second in (
        ("at night, a {a} {c} in the rain", "a {a} {c} in the rain at night"),
        ("in a garden, a {c} and a {d}", "a {d} and a {c} in a garden"),
    )
    for a, _ in _COLOURS
    for c, d in _THINGS
]
