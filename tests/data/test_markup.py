"""Markup of web UIs is found as people write it; ordinary punctuation is not taken for it."""

import time

import pytest

from sage.data.markup import markup


@pytest.mark.parametrize(
    ("prompt", "written"),
    [
        ("(a teapot:1.3) on a table", "(a teapot:1.3)"),
        ("a (very (red:1.2) teapot)", "(red:1.2)"),
        ("(masterpiece: .8), a cat", "(masterpiece: .8)"),
        ("(teapot:2)", "(teapot:2)"),
        ("(style v4:1.3)", "(style v4:1.3)"),
        ("(ugly:-1)", "(ugly:-1)"),
        ("((masterpiece)), a cat", "((masterpiece))"),
        ("a cat, [blurry]", "[blurry]"),
        ("a [cat:dog:0.5]", "[cat:dog:0.5]"),
        ("a (cat)1.3 on a mat", ")1.3"),
        ("a (cat)++, a mat", ")++"),
        ("a cat BREAK a dog", "BREAK"),
        ("a cat, BREAK, a dog", "BREAK"),
        ("a cat AND a dog", "AND"),
        ("<lora:name:0.8> a cat", "<lora:name:0.8>"),
        ("a cat <hypernet:name:1>", "<hypernet:name:1>"),
        (r"miku \(cosplay\)", r"\(cosplay\)"),
    ],
)
def test_markup_is_found(prompt, written):
    assert markup(prompt).written == written


@pytest.mark.parametrize(
    "prompt",
    [
        "a cat (sleeping)",
        "a (small (red)) cat",
        "a clock (at 12:30)",
        "a picture (16:9)",
        "a page (John 3:16)",
        "a lap (1:23.45)",
        "a remark (note: 3)",
        "a lens (f/1.8), 50mm",
        "a photo of [V] dog",
        "<cat-toy> on a mat",
        "a list x = [1, 2]",
        "a sign that says SALT AND PEPPER",
        "a sign that says TAKE A BREAK",
        "BREAK THE ICE",
        "bread and butter, a break in the clouds",
        "a cat: the 1.3 story",
        "a smiley :) and :(",
        '{"subject": "a cat", "colors": ["red", "blue"]}',
    ],
)
def test_ordinary_text_is_not_taken_for_markup(prompt):
    assert markup(prompt) is None


@pytest.mark.parametrize("piece", ["(", "[", "[a", "(a:", "<lora:", r"\(", "((", "AND ", "BREAK, "])
def test_the_time_is_linear_in_the_length(piece):
    began = time.process_time()
    markup(piece * 30_000)
    assert time.process_time() - began < 5
