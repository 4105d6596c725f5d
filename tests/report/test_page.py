"""The page is parsed as a browser would: hostile text stays text, nothing is loaded, every picture is inside."""

from collections import Counter
from html.parser import HTMLParser

import numpy as np
import pytest
from evaluated import figure, verdict
from PIL import Image

from flows.report import page as report
from flows.report.groups_page import groups_image
from flows.report.plots import curve_plots, thinned
from sage.data.accounting import Accounting
from sage.data.dataset import Example
from sage.evaluation.results import parse
from sage.evaluation.samples import Judged
from sage.training.curves import HELD_OUT, TRAINING, Point

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "</p></main><iframe src=javascript:alert(1)>",
    "{{ 7 * 7 }} {% raw %}",
    "</style><svg onload=alert(1)>",
    "\u202egnp.exe &lt;b&gt; \x07",
]


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attributes]

    def handle_data(self, data):
        self.text.append(data)


def arm(value, nfe):
    names = ("kernel_distance", "frechet_distance", "alignment", "group_diversity", "seed_diversity")
    figures = {name: figure(value, value - 0.01, value + 0.01) for name in names}
    return figures | {"nfe_per_image": figure(nfe, nfe, nfe)}


def worse(value, low, high):
    return figure(value, low, high) | {"relative": {"value": value, "low": low, "high": high}}


def results(*arguments, **options):
    return parse(values(*arguments, **options), "it")


def values(passed=True, against_same_nfe=(-0.02, 0.02)):
    arms = {"independent": arm(0.5, 16), "independent_same_nfe": arm(0.4, 12), "shared": arm(0.3, 12)}
    arms["sage"] = arm(0.45, 12)
    part = {name: arms["sage"][name] for name in ("kernel_distance", "alignment", "group_diversity")}
    gate = verdict("kernel_distance", passed=passed, reason="Kernel distance: 5.0% worse <b>.")
    differences = {name: worse(0.05, 0.01, 0.09) for name in part}
    return {
        "features": "efficientnet_lite0",
        "alignment": "a judge",
        "confidence": 0.95,
        "resamples": 1000,
        "set": {"digest": "d" * 64, "generated": "m" * 64, "n_real": 4, "n_prompts": 4, "seeds": [0, 1]},
        "saving": 0.25,
        "arms": arms,
        "real": {"alignment": figure(0.8, 0.79, 0.81), "group_diversity": figure(0.5, 0.4, 0.6)},
        "floor": {"kernel_distance": figure(0.01, 0.0, 0.02), "frechet_distance": figure(40.0, 39.0, 41.0)},
        "worse_by": {
            "independent": differences,
            "independent_same_nfe": {"kernel_distance": worse(0.0, *against_same_nfe)},
        },
        "by_similarity": [
            {
                "part": "tightest third",
                "similarity": [0.8, 0.9],
                "groups": 1,
                "prompts": 2,
                "saving": 0.3,
                "arms": {"sage": part | {"group_diversity": figure(None)}},
            }
        ],
        "gates": [gate],
        "passed": passed,
    }


def rows(captions):
    columns = ["real", "independent", "independent_same_nfe", "shared", "sage"]
    prompts = [(caption, [Image.new("RGB", (8, 8), (k, 0, 0)) for k in range(5)]) for caption in captions]
    row = report.GroupRow(0.85, 0.3, 0.01, columns, prompts)
    sizes = [{"size": 2, "groups": 1, "prompts": 2, "saving": 0.3}]
    embeddings = np.random.default_rng(0).normal(size=(len(captions) + 1, 3))
    drawn = groups_image([*captions, "alone"], embeddings, [list(range(len(captions))), [len(captions)]], [0.85, 1.0])
    return report.GroupRows([row], [row], sizes, 0, 1, drawn)


def run(captions, **changes):
    """What the page shows of a run in which everything went wrong that can, with hostile texts."""
    columns = ["real", "independent", "independent_same_nfe", "shared", "sage"]
    images = [Image.new("RGB", (8, 8), (k, 0, 0)) for k in range(5)]
    accounting = Accounting(
        9, 5, 1, Counter({(48, 80): 3, (64, 64): 2}), {"no_caption": [(text, text) for text in captions]}
    )
    losses = [Point(10 * k, TRAINING, term, 1 / k) for k in range(1, 9) for term in ("loss", "diffusion", "branch")]
    losses += [Point(10 * k, HELD_OUT, term, 1 / (1 + k)) for k in range(3) for term in ("loss", "t0_249", "t250_499")]
    found = {
        "accounting": accounting,
        "unread": [(text, 9) for text in captions],
        "worst": [report.PromptRow(text, 0.125, columns, images) for text in captions],
        "curves": curve_plots(losses),
    }
    return report.RunRows(**found | changes)


def built(found=None, captions=("a",), **changes):
    return report.build(found or results(), rows(captions), run(captions, **changes))


@pytest.fixture(scope="module")
def page():
    return Page(built(captions=HOSTILE))


def test_hostile_captions_end_up_as_text(page):
    text = "".join(page.text)
    assert all(caption in text for caption in HOSTILE)
    assert not {"script", "iframe", "object", "embed", "form", "link", "base"} & set(page.tags)
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert "Kernel distance: 5.0% worse <b>." in text and report.comparison(results()) in text
    captions = {value for tag, name, value in page.attributes if (tag, name) == ("img", "alt")}
    assert f"SAGE: {HOSTILE[1]}" in captions


def test_nothing_is_loaded_from_outside(page):
    sources = [value for tag, name, value in page.attributes if name == "src"]
    assert len(sources) == 3 * 5 * len(HOSTILE)  # across, hardest, worst
    assert all(source.startswith("data:image/webp;base64,") for source in sources)
    links = [value for _, name, value in page.attributes if name in ("href", "xlink:href", "action", "srcset")]
    assert links and all(link.startswith("#") for link in links)  # marks inside the plots
    assert not [text for text in page.text if "@import" in text or "url(http" in text]
    policies = [value for tag, name, value in page.attributes if (tag, name) == ("meta", "content")]
    assert any(policy.startswith("default-src 'none'") for policy in policies)


def test_the_plots_follow_the_colours_of_the_page_and_share_no_ids(page):
    assert page.tags.count("svg") == 7  # three plots of quality, three of losses, and the map
    ids = [value for _, name, value in page.attributes if name == "id"]
    references = [value[1:] for _, name, value in page.attributes if name == "xlink:href"]
    assert set(references) <= set(ids)
    marks = [value for value in ids if value in references]
    assert len(marks) == len(set(marks))
    styles = "".join(value for tag, name, value in page.attributes if name == "style")
    assert "var(--sage)" in styles and "var(--ink)" in styles
    assert not any(colour in styles for colour in ("#0a0b0", "#010203", "#040506", "#070809"))


def test_every_prompt_is_a_point_of_the_map_in_the_colour_of_its_group():
    drawn = Page(built(captions=HOSTILE))
    fills = [
        value
        for tag, name, value in drawn.attributes
        if (tag, name) == ("g", "fill") and value.startswith(("hsl", "#bbb"))
    ]
    assert len(fills) == 2 and fills[1] == "#bbb" != fills[0]
    assert drawn.tags.count("circle") == len(HOSTILE) + 1
    told = [text for text in drawn.text if "worst pair 0.850" in text]
    assert len(told) == len(HOSTILE)
    assert all(all(caption in text for caption in HOSTILE) for text in told)


def test_the_headline_says_what_passed_and_what_failed():
    assert (
        report.headline(results())
        == "SAGE draws these pictures with 25% fewer network evaluations, and passes every gate."
    )
    assert report.headline(results(passed=False)).endswith("but fails 1 of 1 gates: kernel distance.")


def test_the_page_says_what_judged_on_how_many_pictures_and_warns_of_a_judge_of_no_use():
    judges = {"features": "Inception, SHA-256 abc", "alignment": "CLIP of them, SHA-256 def"}
    found = values(passed=False) | {
        "features": "inception",
        "alignment": "CLIP score",
        "measured_by": judges,
        "other_captions": figure(0.7, 0.6, 0.8, 4),
        "warnings": ["The judge does not tell <captions> apart."],
    }
    page = Page(built(parse(found, "it"), ["a cat", "a dog"]))
    text = "".join(page.text)
    assert "Inception, SHA-256 abc, on 4 real pictures and 8 of each arm" in text
    assert "CLIP score: CLIP of them, SHA-256 def; 4 real pictures score 0.800 with their own captions, 0.700" in text
    assert "Warning. The judge does not tell <captions> apart." in text
    assert "FID" in text and "KID" in text and "not FID" not in text
    assert report.headline(parse(found, "it")).endswith("but fails 1 of 1 gates: KID.")


@pytest.mark.parametrize(
    ("ends", "words"),
    [((-0.02, -0.01), "better than"), ((0.01, 0.02), "worse than"), ((-0.01, 0.01), "no significant difference from")],
)
def test_the_page_compares_with_what_the_same_cost_buys_without_sharing(ends, words):
    assert words in report.comparison(results(against_same_nfe=ends))


def test_figures_that_are_missing_are_dashes_and_the_page_still_stands():
    found = values()
    found["arms"]["sage"]["group_diversity"] = figure(None)
    found["worse_by"]["independent"]["group_diversity"] = worse(None, None, None)
    found["worse_by"].pop("independent_same_nfe")
    assert "SAGE draws" in built(parse(found, "it"))


def test_the_page_says_what_went_wrong_with_data_prompts_and_images(page):
    text = " ".join(" ".join(page.text).split())
    assert "9 input rows: 5 kept, 1 duplicates (same image, same caption), 7 rejected." in text
    assert "no caption 7" in text and f"{HOSTILE[0]}: {HOSTILE[0]}" in text and HOSTILE[3] + ": " not in text
    assert "80 \N{MULTIPLICATION SIGN} 48 3 60%" in text and "64 \N{MULTIPLICATION SIGN} 64 2 40%" in text
    assert "does not read 7 of 4 prompts to their end" in text and f"{HOSTILE[1]} 9" in text
    assert "timesteps 250 to 499" in text and "branch phase" in text
    assert "alignment 0.125" in text


def test_what_went_well_is_not_mentioned():
    plain = built(accounting=Accounting(5, 5), unread=[], worst=[], curves=[])
    text = " ".join("".join(Page(plain).text).split())
    assert "5 input rows: 5 kept, 0 duplicates (same image, same caption), 0 rejected." in text
    for heading in ("Blank images", "The worst prompts", "Tokens that are not read", "The training", "by size"):
        assert heading not in text, heading


def test_blank_images_are_counted_at_the_top():
    text = " ".join("".join(Page(built(parse(values() | {"blank": {"sage": 3}}, "it"))).text).split())
    assert "Blank images. 3 of 8 images of SAGE are of a single colour" in text


def test_long_lines_of_losses_are_averaged_to_what_a_plot_can_show():
    line = [(step, float(step)) for step in range(1, 1001)]
    short = thinned(line)
    assert len(short) <= 150 and short[0] == (4.0, 4.0) and short[-1][0] > 990
    assert thinned(line[:5]) == line[:5]


def test_the_worst_prompts_are_those_with_the_lowest_alignment(tmp_path):
    images = []
    for number in range(20):
        images.append(tmp_path / f"{number}.png")
        Image.new("RGB", (4, 4), (number, 0, 0)).save(images[-1])
    examples = [Example(f"p{number}", path, f"text {number}", "f") for number, path in enumerate(images)]
    judged = Judged(
        examples,
        [[k] for k in range(20)],
        [1.0] * 20,
        [0, 1],
        {"sage": [[path] * 2 for path in images]},
        {},
        {"p4": 2, "p9": 7},
        None,
    )
    fit = np.stack([np.arange(20.0)[::-1], np.zeros(20)], axis=1)
    found = report.run_rows(judged, fit, Accounting(), [])
    assert [row.text for row in found.worst] == [f"text {number}" for number in range(19, 7, -1)]
    assert [row.score for row in found.worst[:3]] == [0.0, 0.5, 1.0]
    assert found.worst[0].images[1].getpixel((0, 0)) == (19, 0, 0)
    assert found.unread == [("text 9", 7), ("text 4", 2)]
    assert report.run_rows(judged, None, Accounting(), []).worst == []


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "\N{EN DASH}"), (134.53, "134.5"), (9.876, "9.88"), (0.1237, "0.124"), (-0.00123, "\N{MINUS SIGN}0.0012")],
)
def test_numbers_keep_three_digits_that_count(value, text):
    assert report.number(value) == text


def test_a_sheet_has_a_line_for_each_prompt_and_a_column_for_each_arm():
    row = rows(["a", "b"]).across[0]
    sheet = report.group_sheet(row)
    assert sheet.size == (5 * 22 + 6, 18 + 2 * 22 + 6)
    assert sheet.getpixel((6 + 4 * 22 + 8, 18 + 6 + 22 + 8)) == (4, 0, 0)
