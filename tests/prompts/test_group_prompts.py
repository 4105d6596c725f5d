"""`sage group PROMPTS` and its page, as a user meets them."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from flows.prompts.files import read_prompts
from flows.prompts.group import main
from flows.report.groups_page import groups_page, positions
from sage.errors import DataError

ROOT = Path(__file__).parents[2]
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)> [red]x[/red] \x1b[31m %s {{ 1 }}"


class Elements(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


@pytest.fixture
def prompts(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("SAGE_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "prompts.txt"
    path.write_text("\ufeffa red fox\n\n the fox is red \r\na stock market crash\n" + HOSTILE + "\n", encoding="utf-8")
    return path


def test_the_command_prints_savings_sizes_and_the_widest_groups(prompts, tmp_path, capsys):
    page = tmp_path / "page.html"
    main(str(prompts), page=page, threshold=0.7, literal=True)
    said = capsys.readouterr().out
    assert "4 prompts in 3 groups at cosine 0.7" in said
    assert "8.3%" in said  # share ratio 0.4, two of six steps: 2 / 6 * (1 - 3 / 4)
    assert "a red fox" in said and "the fox is red" in said and "stock" not in said
    assert "a red fox" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("p.csv", "share_key,prompt\nann,{0}\nbob,{0}s\nann,the {0}\n"),
        (
            "p.jsonl",
            '{{"prompt": "{0}", "share_key": "1"}}\n{{"prompt": "{0}s"}}\n{{"prompt": "the {0}", "share_key": 1}}\n',
        ),
    ],
)
def test_rows_of_different_share_keys_are_kept_apart(prompts, tmp_path, capsys, name, rows):
    path = tmp_path / name
    path.write_text(rows.format("dog in a park"), encoding="utf-8")
    main(str(path), page=tmp_path / "page.html", threshold=0.7)
    assert "3 prompts in 2 groups" in capsys.readouterr().out
    job_rows = [(item.prompt, item.share_key) for item in read_prompts(str(path))]
    assert job_rows[0][1] == job_rows[2][1] != job_rows[1][1]


def test_the_guard_of_the_command_line_parts_what_the_encoder_takes_for_alike(prompts, tmp_path, capsys):
    prompts.write_text("two dogs in a park\nthree dogs in a park\n", encoding="utf-8")
    main(str(prompts), page=tmp_path / "page.html", threshold=0.7)
    assert "2 prompts in 1 groups" in capsys.readouterr().out
    main(str(prompts), page=tmp_path / "page.html", threshold=0.7, guard=["number"])
    assert "2 prompts in 2 groups" in capsys.readouterr().out


def test_prompts_of_another_script_are_counted_and_latin_ones_are_not(prompts, tmp_path, capsys):
    prompts.write_text(
        "\u72d7\u5728\u8dd1\n\u0643\u0644\u0628\nein Hund l\u00e4uft\n\u72d7 dog dog\n123\n", encoding="utf-8"
    )
    main(str(prompts), page=tmp_path / "page.html")
    assert "2 prompts are in a script other than Latin" in capsys.readouterr().out
    prompts.write_text("un chien\nein Hund\n", encoding="utf-8")
    main(str(prompts), page=tmp_path / "page.html")
    assert "other than Latin" not in capsys.readouterr().out


def test_a_hostile_prompt_stays_text_in_the_page(prompts, tmp_path):
    page = tmp_path / "page.html"
    main(str(prompts), page=page, literal=True)
    html = page.read_text(encoding="utf-8")
    elements = Elements()
    elements.feed(html)
    assert [tag for tag, _ in elements.found].count("script") == 2 and "img" not in dict(elements.found)
    assert not any(name.startswith("on") or name in ("src", "href") for _, attrs in elements.found for name in attrs)
    data = json.loads(re.search(r'id="prompts">(.*?)</script>', html, re.S).group(1))
    assert data["text"] == ["a red fox", "the fox is red", "a stock market crash", HOSTILE.replace("\x1b", "")]
    assert data["group"][0] == data["group"][1] != data["group"][2]
    assert len(data["x"]) == len(data["y"]) == 4


def test_templates_are_grouped_as_sage_generate_draws_them(prompts, tmp_path, capsys):
    prompts.write_text("a {red|blue} fox\na red fox\n(a fox:1.3)\n", encoding="utf-8")
    main(str(prompts), page=tmp_path / "page.html", threshold=0.5, expand="all")
    said = capsys.readouterr()
    assert "3 prompts in 2 groups" in said.out and "not grouped: 000003: markup: '(a fox:1.3)' is a weight" in said.err
    main(str(prompts), page=tmp_path / "page.html", threshold=0.5, literal=True)
    assert "3 prompts" in capsys.readouterr().out


def test_a_list_without_a_prompt_is_refused(prompts, tmp_path):
    prompts.write_text("\n \n")
    for path in (prompts, tmp_path / "none.txt", tmp_path):
        with pytest.raises(DataError, match=re.escape(str(path))):
            main(str(path), page=tmp_path / "page.html")


def test_it_groups_the_prompts_that_sage_generate_draws(prompts, tmp_path, capsys):
    rows = [{"id": f"p{n}", "prompt": text} for n, text in enumerate(["a red fox", "the fox is red", "a market"])]
    path = tmp_path / "list.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"id": "p3"}]))
    main(str(path), page=tmp_path / "page.html", threshold=0.7)
    said = capsys.readouterr()
    assert "3 prompts in 2 groups" in said.out and "not grouped: p3: no_caption" in said.err


@pytest.mark.parametrize("n, d", [(1, 3), (2, 1), (3, 3), (40, 8), (3100, 4)])
def test_positions_lie_on_the_map(n, d):
    x = np.random.default_rng(0).normal(size=(n, d)).astype(np.float32)
    x[0] = np.nan
    places = positions(x)
    assert places.shape == (n, 2) and np.isfinite(places).all()
    assert places.min() >= 0 and places.max() <= 1
    assert np.array_equal(places, positions(x))


def test_all_identical_prompts_have_a_page():
    page = groups_page("T", "s", ["a"] * 12, np.ones((12, 4), np.float32), [list(range(12))], [1.0])
    assert '"group": [0, 0' in page
