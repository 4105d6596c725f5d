"""Templates stand for exactly the prompts that they say, or are refused before any is made."""

import contextlib
import itertools
import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sage.data.templates import LIMIT, Syntax, expand
from sage.errors import ConfigurationError, DataError


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "animals").mkdir()
    files = {
        "colour.txt": "\ufeffred\n\n# a remark\n  blue  \n",
        "animals/pet.txt": "cat\n{small|big} dog\n",
        "thing.txt": "__animals/pet__\nvase\n",
        "round.txt": "a\n__back__\n",
        "back.txt": "__round__\n",
        "empty.txt": "# nothing\n",
        "latin.txt": b"caf\xe9\n",
        "bad.txt": "fine\n{a|b\n",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return tmp_path


@pytest.mark.parametrize(
    ("template", "prompts"),
    [
        ("{red|blue} vase, {oil|photo}", ["red vase, oil", "red vase, photo", "blue vase, oil", "blue vase, photo"]),
        ("a {very|} tall {tree|{small|big} house}", [f"a {v}tall {t}" for v in ("very ", "")
                                                     for t in ("tree", "small house", "big house")]),
        ("a __colour__ __thing__", [f"a {c} {t}" for c in ("red", "blue")
                                    for t in ("cat", "small dog", "big dog", "vase")]),
        ("a {__colour__|green} cat", ["a red cat", "a blue cat", "a green cat"]),
        (r"a \{red\|blue\} \__colour\__ {cat|dog}", ["a {red|blue} __colour__ cat", "a {red|blue} __colour__ dog"]),
        ("plain text, 50% off # 3, a_b ____", ["plain text, 50% off # 3, a_b ____"]),
        ("a {cat} and {}", ["a {cat} and {}"]),
        ("red|blue", ["red|blue"]),
        ('{"subject": "a cat", "style": {"of": "x|y"}}', ['{"subject": "a cat", "style": {"of": "x|y"}}']),
        ('{"subject": "a {red|blue} cat"}', ['{"subject": "a red cat"}', '{"subject": "a blue cat"}']),
    ],
)  # fmt: skip
def test_a_template_stands_for_these_prompts(folder, template, prompts):
    assert expand(template, folder).prompts == prompts


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("a {red|blue vase", r"\{ at character 3 is never closed"),
        ("a {red|{blue} vase", r"\{ at character 3 is never closed"),
        ("red|blue} vase", r"\} at character 9 closes nothing"),
        ("a __missing__ cat", r"missing\.txt does not exist"),
        ("a __../colour__ cat", "is not the name of one file"),
        ("a __col*__ cat", "is not the name of one file"),
        ("__round__", "wildcards stand for themselves: round > back > round"),
        ("__empty__", "has no line to choose from"),
        ("__latin__", "is not UTF-8"),
        ("__bad__", r"bad\.txt, alternative 2: \{ at character 1 is never closed"),
        ("{2$$a|b|c}", "a choice of several alternatives, which is not supported"),
        ("{1-2$$a|b|c}", "a choice of several alternatives, which is not supported"),
        ("{0.5::red|blue}", "a weight of an alternative, which is not supported"),
        ("{red|3::blue}", "a weight of an alternative, which is not supported"),
        ("${x=red} ${x}", "a variable, which is not supported"),
        ("{@red|blue}", "a choice of sampler, which is not supported"),
        ("{" * 5000, "more than 20 deep"),
        ("{red|({blue|green}:1.2)} vase", r"'\(blue:1.2\)' is a weight in web UIs"),
    ],
)
def test_what_is_no_template_is_refused_by_name(folder, template, said):
    with pytest.raises(DataError, match=said):
        expand(template, folder)


def test_a_link_out_of_the_folder_is_not_followed(folder, tmp_path_factory):
    secret = tmp_path_factory.mktemp("other") / "secret.txt"
    secret.write_text("secret\n")
    (folder / "link.txt").symlink_to(secret)
    with pytest.raises(DataError, match="is a link"):
        expand("__link__", folder)


def test_a_wildcard_without_a_folder_is_refused():
    with pytest.raises(DataError, match="stands for a file; name its folder"):
        expand("a __colour__ cat")


@pytest.mark.parametrize(("power", "amount"), [(20, "1,048,576"), (5000, r"more than 10\^12")])
def test_too_many_prompts_are_counted_before_any_is_made(power, amount):
    began = time.process_time()
    with pytest.raises(DataError, match=f"stands for {amount} prompts, more than 10,000"):
        expand("{a|b}" * power)
    assert time.process_time() - began < 5
    assert len(expand("{a|b}" * power, sample=10).prompts) == 10


def test_the_largest_template_is_expanded():
    assert len(set(expand("{0|1|2|3|4|5|6|7|8|9}" * 4).prompts)) == LIMIT


def test_a_sample_is_drawn_without_repetition_and_grows_from_its_beginning():
    template = "{a|b|c} {d|e|f} {g|h|i}"
    every = expand(template).prompts
    drawn = expand(template, sample=100, seed=1).prompts
    assert sorted(drawn) == sorted(every) and drawn != every
    assert expand(template, sample=5, seed=1).prompts == drawn[:5]
    assert expand(template, sample=5, seed=2).prompts != drawn[:5]


def test_draws_do_not_depend_on_the_other_templates_and_each_prompt_names_its_own():
    found = expand(["{a|b|c|d} x", "{a|b|c|d} y", "z"], sample=2, seed=3)
    assert found.templates == [0, 0, 1, 1, 2]
    assert found.prompts[2:4] == expand("{a|b|c|d} y", sample=2, seed=3).prompts


@pytest.mark.parametrize("sample", [0, -1, LIMIT + 1])
def test_a_sample_of_another_size_is_refused(sample):
    with pytest.raises(ConfigurationError, match=f"{sample} prompts of each template"):
        expand("{a|b}", sample=sample)


TEXT = st.text("ab ", min_size=1, max_size=3)


@given(st.lists(st.lists(TEXT, min_size=2, max_size=3), min_size=1, max_size=4))
def test_all_combinations_come_once_in_order(alternatives):
    template = ",".join("{" + "|".join(texts) + "}" for texts in alternatives)
    expected = [" ".join(",".join(texts).split()) for texts in itertools.product(*alternatives)]
    assert expand(template).prompts == expected


@given(st.text("{}|_\\$ab(:1)", max_size=40))
def test_any_text_is_expanded_or_refused(text):
    with contextlib.suppress(DataError):
        assert expand(text, sample=3, literal=True).prompts


@given(st.dictionaries(st.text("ab{|", max_size=3), st.text("ab|", max_size=3), min_size=1, max_size=3))
def test_an_object_of_json_that_is_no_template_does_not_change_without_expansion(content):
    text = json.dumps(content)
    assert Syntax().prompts(text) == [text]


@pytest.mark.parametrize("text", ["{red|blue} vase", "a __colour__ vase", "a {very|} tall tree"])
def test_a_template_that_is_not_expanded_is_refused_unless_it_is_text(text):
    with pytest.raises(DataError, match="is a wildcard; expand it"):
        Syntax().prompts(text)
    assert Syntax(literal=True).prompts(text) == [text]


@pytest.mark.parametrize("text", ["snake__case__name", "a line ____ to fill", "{}", "a {cat}", "red|blue", "a | {b}"])
def test_what_is_no_template_is_text(text):
    assert Syntax().prompts(text) == [text]


@pytest.mark.parametrize("piece", ["{", "{|", "|", "__a ", "_", "{a|", "__a", "{a}", "\\{"])
def test_the_time_is_linear_in_the_length(piece):
    began = time.process_time()
    for syntax in (Syntax(), Syntax(expand=True, sample=1)):
        with contextlib.suppress(DataError):
            syntax.prompts(piece * 30_000)
    assert time.process_time() - began < 5
