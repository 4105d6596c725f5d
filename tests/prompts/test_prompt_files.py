"""The one reader of lists of prompts: no prompt changes without a word, and a bad row costs no other."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from flows.prompts import generate
from flows.prompts.files import negative, read_prompts, syntax
from sage.data.templates import Syntax
from sage.errors import ConfigurationError, DataError


def rows(tmp_path, content, name="list.txt", written=Syntax()):  # noqa: B008
    """Return (id, prompt or error) of each row of a list with this content."""
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return [(item.id, item.prompt or item.error) for item in read_prompts(str(path), written)]


def prompts(tmp_path, content, name="list.txt"):
    return [text for _, text in rows(tmp_path, content, name)]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("p.txt", "a cat\n\n  a  dog \n\x1b[31mred\x0c sky", ["a cat", "a dog", "[31mred sky"]),
        ("p.txt", "a\x0cb\u2028c\r\nd\r\n", ["a b c", "d"]),
        ("p.txt", "a cat\ra dog\r", ["a cat", "a dog"]),  # line ends of old Macs and of Excel for Mac
        ("p.jsonl", '"a cat"\r"a dog"', ["a cat", "a dog"]),
        ("p.csv", 'prompt\r"a\rcat"\ra dog\r', ["a cat", "a dog"]),
        ("p.jsonl", '{"id": "x", "text": "a cat"}\n"a dog"\n', ["a cat", "a dog"]),
        ("p.jsonl", '{"Prompt": "a cat"}\n', ["a cat"]),
        ("p.jsonl", '[\n  {"prompt": "a cat"},\n  "a dog"\n]\n', ["a cat", "a dog"]),
        ("p.json", '["a cat"]', ["a cat"]),
        ("p.csv", 'id,prompt\nx,"a cat, red"\ny,"a\ndog"\n', ["a cat, red", "a dog"]),
        ("p.csv", "id;prompt\n1;a red fox, in snow\n2;blue heart\n", ["a red fox, in snow", "blue heart"]),
        ("p.csv", "id\tprompt\n1\ta red fox, in snow\n", ["a red fox, in snow"]),
        ("p.tsv", "id\tprompt\n1\ta red fox, in snow\n", ["a red fox, in snow"]),
        ("p.csv", "prompt;notes, other, more\na cat, red;x\n", ["a cat, red"]),
        ("p.csv", "Id,Prompt\n1,red heart\n", ["red heart"]),
        ("p.csv", 'id, prompt\n1, red heart\n2, "red, blue"\n', ["red heart", "red, blue"]),
        ("p.csv", "sep=;\nid;prompt\n1;red, heart\n", ["red, heart"]),
        ("p.csv", "id,prompt\n1,red heart\n,\n\n,\n", ["red heart"]),
        ("p.csv", "prompt\nred heart,\n", ["red heart"]),
        ("p.csv", 'prompt\na sign that says "hello"\n', ['a sign that says "hello"']),
    ],
)
def test_every_form_of_list_is_read(tmp_path, name, content, expected):
    assert prompts(tmp_path, content, name) == expected


def test_names_are_given_or_numbers(tmp_path):
    assert rows(tmp_path, '{"id": "x", "prompt": "a"}\n{"id": 7, "prompt": "b"}\n{"prompt": "c"}\n', "p.jsonl") == [
        ("x", "a"),
        ("7", "b"),
        ("000003", "c"),
    ]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("name", ["p.txt", "p.csv"])
def test_a_byte_order_mark_is_honoured(tmp_path, encoding, name):
    texts = ["caf\xe9 at night", "\u591c\u306e\u732b"]
    mark = {"utf-16-le": "\ufeff", "utf-16-be": "\ufeff"}.get(encoding, "")
    head = "prompt\r\n" if name == "p.csv" else ""
    content = (mark + head + "".join(f"{text}\r\n" for text in texts)).encode(encoding)
    assert prompts(tmp_path, content, name) == texts


def test_another_encoding_is_named_and_costs_only_the_prompts_that_need_it(tmp_path):
    text = "red heart\n\u591c\u306e\u732b\u304c\u8857\u3092\u6b69\u304f\nblue heart\n"
    red, night, blue = prompts(tmp_path, text.encode("cp932"))
    assert (red, blue) == ("red heart", "blue heart")
    assert re.fullmatch(r"bad_text: byte 0x96 is not UTF-8 \(the list .*cp932.*\); save the list as UTF-8", night)


def test_japanese_in_ascii_bytes_is_not_drawn_as_those_letters(tmp_path):
    wrong, cat = prompts(tmp_path, "\u591c\u306e\u732b\na cat\n".encode("iso2022_jp"))
    assert wrong == "bad_text: it has an escape sequence of ISO-2022; save the list as UTF-8"
    assert cat == "a cat"


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("text", ["red heart", "red heart\nblue heart\n", "\u591c\u306e\u732b\n\u591c\n"])
def test_utf_16_and_32_without_a_mark_are_refused(tmp_path, encoding, text):
    with pytest.raises(DataError, match="zero bytes as UTF-16 does, but no byte order mark"):
        rows(tmp_path, text.encode(encoding))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("id,prompt\n1,a red fox, in snow, at night\n2,blue heart\n", ["4 cells, but the table has 2", "blue heart"]),
        ("prompt,id\na red fox, in snow,1\nblue heart,2\n", ["3 cells, but the table has 2", "blue heart"]),
        ("prompt\na red fox, in snow\nblue heart\n", ["2 cells, but the table has 1 column;", "blue heart"]),
        ('id,prompt\n1,"a sign\n2,blue heart\n3,"green"\n', ["a quote begins a cell", "blue heart", "green"]),
        ('id,prompt\n1,blue heart\n2,"a sign\n3,red heart\n', ["blue heart", "a quote begins a cell", "red heart"]),
        ('id,prompt\n1,"hello" on a sign, at night\n2,blue heart\n', ["a quote begins a cell", "blue heart"]),
        ("id,style,prompt\n1,photo,red heart\n2,photo\n", ["red heart", "no_caption: the caption is missing"]),
        ('prompt\n"' + "a red fox, " * 13000 + '"\nblue heart\n', ["field larger than field limit", "blue heart"]),
    ],
)
def test_a_bad_row_of_a_table_is_an_error_and_costs_no_other_row(tmp_path, content, expected):
    found = prompts(tmp_path, content, "p.csv")
    assert len(found) == len(expected)
    assert all(part in text for part, text in zip(expected, found, strict=True)), found


def test_a_bad_line_of_json_is_an_error_and_costs_no_other_line(tmp_path):
    content = '{broken\n{"prompt": "a cat"}\n3\n{"prompt": "\\ud800"}\n{}\n'
    broken, cat, number, half, empty = prompts(tmp_path, content, "p.jsonl")
    assert cat == "a cat"
    assert broken.startswith("bad_row: not JSON") and number.startswith("bad_row: int is neither")
    assert half.startswith("bad_text") and empty.startswith("no_caption")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("[" * 100_000, "bad_row: not JSON"),
        ('{"prompt":' * 100_000, "bad_row: not JSON"),
        ('{"prompt": "a", "prompt": "b"}', "bad_row: two values for prompt"),
        ('{"Prompt": "a", "prompt": "b"}', "bad_row: two values for prompt"),
    ],
    ids=["nested lists", "nested objects", "a key twice", "a key twice in other letters"],
)
def test_json_that_cannot_be_taken_at_its_word_is_an_error(tmp_path, line, says):
    wrong, cat = prompts(tmp_path, line + '\n{"prompt": "a cat"}\n', "p.jsonl")
    assert wrong.startswith(says) and cat == "a cat"


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("p.pdf", "a", r"ends in .pdf; prompts are read from .txt, .jsonl, .json, .csv, .tsv or -"),
        ("p.csv", "a,b\n1,2", r"columns \['a', 'b'\], but none is named prompt or text"),
        ("p.csv", "", "none is named prompt or text"),
        ("p.csv", "prompt,prompt\nred heart,blue heart\n", "2 columns are named prompt; leave one"),
        ("p.jsonl", '{"id": "../x", "prompt": "a"}', r"prompt 1 is named '../x'; names become files"),
        ("p.jsonl", '{"id": "A", "prompt": "a"}\n{"id": "a", "prompt": "b"}', "two prompts are named 'a'"),
    ],
)
def test_a_list_that_cannot_be_read_says_why(tmp_path, name, content, says):
    with pytest.raises(DataError, match=says):
        rows(tmp_path, content, name)


def test_a_template_is_expanded_only_on_request_and_its_error_names_its_row(tmp_path):
    content = '{"id": "x", "prompt": "a {red|blue} cat"}\n{"id": "y", "prompt": "a {red|blue"}\n"a dog"\n'
    plain = rows(tmp_path, content, "p.jsonl")
    assert [name for name, _ in plain] == ["x", "y", "000003"]
    assert plain[0][1].startswith("bad_template: {red|blue} is a wildcard; expand it (--expand all)")
    assert rows(tmp_path, content, "p.jsonl", Syntax(literal=True))[0] == ("x", "a {red|blue} cat")
    red, blue, wrong, dog = rows(tmp_path, content, "p.jsonl", Syntax(expand=True))
    assert (red, blue, dog) == (("x-1", "a red cat"), ("x-2", "a blue cat"), ("000003", "a dog"))
    assert wrong[0] == "y" and wrong[1].startswith("bad_template: { at character 3 is never closed")


def test_prompts_in_json_do_not_change(tmp_path):
    texts = ['{"subject": "a cat", "colors": ["red", "blue"]}', '{"a": {"b": "x|y"}}']
    assert prompts(tmp_path, "\n".join(texts), "p.txt") == texts
    assert [text for _, text in rows(tmp_path, "\n".join(texts), "p.txt", Syntax(expand=True))] == texts


def test_names_of_expanded_prompts_sort_and_meet_no_others(tmp_path):
    names = [name for name, _ in rows(tmp_path, "{0|1|2|3|4|5|6|7|8|9}", written=Syntax(expand=True))]
    assert names == sorted(names) and names[0] == "000001-01"
    with pytest.raises(DataError, match="two prompts are named '000001-1'"):
        rows(tmp_path, '"{a|b}"\n{"id": "000001-1", "prompt": "c"}\n', "p.jsonl", Syntax(expand=True))


def test_prompts_of_a_template_have_a_share_key_of_their_own_within_that_of_the_row(tmp_path):
    path = tmp_path / "p.csv"
    path.write_text("share_key,prompt\nann,a {red|blue} cat\nann,a dog\nbob,a {red|blue} cat\nann,a {red} cat\n")
    keys = [item.share_key for item in read_prompts(str(path), Syntax(expand=True))]
    assert keys[0] == keys[1] and keys[3] == keys[4] and len(set(keys)) == 3
    assert keys[2] == keys[5] == "ann"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ((None, "."), "--wildcards is the folder for --expand, which is missing"),
        (("all", "none"), "--wildcards none is no folder"),
        (("some", None), "--expand is 'some'; give all, or the number"),
        (("0", None), "0 prompts of each template"),
    ],
)
def test_options_that_contradict_are_refused(options, says):
    expand, folder = options
    with pytest.raises(ConfigurationError, match=says):
        syntax(expand, folder and Path(folder), literal=False, seed=0)


NEGATIVE = [
    ("(bad:1.3)", "'(bad:1.3)' is a weight in web UIs"),
    ("bad, [ugly]", "lowers a weight"),
    ("<lora:bad:1>", "load it with pipe.load_lora_weights"),
    ("{bad|ugly}", "'{bad|ugly}' is a template, and only prompts are expanded"),
    ("a __colour__ one", "'__colour__' is a template"),
    ("bad\0", "bad_text: the caption has U+0000"),
]


@pytest.mark.parametrize(("text", "said"), NEGATIVE)
def test_what_is_refused_in_a_prompt_is_refused_in_the_negative_prompt(text, said, tmp_path):
    with pytest.raises(ConfigurationError, match=f"^--negative-prompt: .*{re.escape(said)}"):
        generate.main("missing.txt", tmp_path / "out", negative_prompt=text)
    if not said.startswith("bad_text"):
        assert negative(text, literal=True) == text


def test_an_empty_negative_prompt_is_none_and_others_are_cleaned_as_prompts_are():
    assert negative(" \n", False) == ""
    assert negative("  blurred,\tdark\u200b ", False) == "blurred, dark"


def test_standard_input_is_read():
    code = "from flows.prompts.files import read_prompts; print([item.prompt for item in read_prompts('-')])"
    done = subprocess.run([sys.executable, "-c", code], input=b"a cat\n\xff\na dog\n", capture_output=True, check=True)
    assert done.stdout.decode().strip() == "['a cat', '', 'a dog']"
