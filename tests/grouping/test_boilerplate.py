import numpy as np
import pytest

from benchmarks.boilerplate import FOXES, SETS, SUBJECTS
from benchmarks.languages import SAID
from sage.config import load_params
from sage.data.figures import figures
from sage.grouping.boilerplate import LEAST, boilerplate, distinct, mean_cosine
from sage.grouping.doubts import doubts, other_script
from sage.grouping.embedding import embed
from sage.grouping.groups import group

UNLIKE = [name for name in SETS if name.startswith("30 subjects")]


@pytest.mark.parametrize("name", UNLIKE)
def test_what_prompts_have_in_common_is_no_reason_to_group_them(name):
    bare, prompts = SETS[name]
    assert group(embed(distinct(prompts)), 0.5, 6, 0.999) == group(embed(bare), 0.5, 6, 0.999)


@pytest.mark.parametrize("count", [2, 5, 30])
def test_prompts_of_one_subject_stay_together_with_and_without_boilerplate(count):
    for name in ("30 foxes", "30 foxes, long tags"):
        prompts = SETS[name][1][:count]
        groups = group(embed(distinct(prompts)), 0.5, 6, 0.999)
        assert len(groups) == -(-count // 6)


def test_nothing_is_cut_from_few_prompts_or_from_prompts_without_boilerplate():
    tagged = [f"masterpiece, 8k, {subject}" for subject in SUBJECTS]
    assert distinct(tagged[:LEAST]) == tagged[:LEAST]
    assert distinct(tagged[: LEAST + 1]) != tagged[: LEAST + 1]
    assert distinct(SUBJECTS) == SUBJECTS and distinct(FOXES) == FOXES
    assert distinct([]) == []
    assert distinct(["a red fox, 8k"] * 30) == ["a red fox, 8k"] * 30  # copies have nothing else


def test_what_is_cut_does_not_depend_on_the_order_or_on_case():
    prompts = SETS["30 subjects, weights and LoRA"][1]
    found = dict(zip(prompts, distinct(prompts), strict=True))
    assert distinct(prompts[::-1]) == [found[prompt] for prompt in prompts[::-1]]
    assert boilerplate([p.upper() for p in prompts]) == boilerplate(prompts)
    assert list(found.values()) == SUBJECTS


def test_the_shipped_captions_have_no_boilerplate():
    shipped = load_params().prepare.figures
    captions = [one.texts[0] for one in figures(shipped.styles, "test", 300, 0, shipped.held_out)]
    assert captions and boilerplate(captions) == []


def test_mean_cosine_is_that_of_all_pairs():
    x = np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    assert mean_cosine(x) == pytest.approx((x @ x.T)[np.triu_indices(9, 1)].mean(), abs=1e-6)
    assert mean_cosine(x[:1]) == mean_cosine(x[:0]) == 0


def test_a_set_that_is_all_alike_is_told():
    prompts = SETS["5 subjects, long tags"][1]
    assert "all alike" in doubts(prompts, embed(prompts), 0.5)[0]
    assert doubts(FOXES[:2], embed(FOXES[:2]), 0.5) == []  # two of one subject are meant to share
    assert doubts(SUBJECTS, embed(SUBJECTS), 0.5) == []
    prompts = SETS["30 subjects, short tags"][1]
    (cut,) = doubts(prompts, embed(distinct(prompts)), 0.5)
    assert "without 5 phrases" in cut and "masterpiece" in cut


def test_letters_decide_the_script():
    assert other_script("\u72d7\u5728\u8dd1, 8k") and not other_script("\u72d7 a dog") and not other_script("123")


def test_prompts_that_the_encoder_does_not_read_are_told():
    russian = [pair[0] for pair in SAID["Russian"]]
    found = doubts(russian, embed(russian), 0.5)
    assert any("10 prompts are in a script other than Latin" in doubt for doubt in found)
    turkish = [pair[0] for pair in SAID["Turkish"]]
    assert not any("script" in doubt for doubt in doubts(turkish, embed(turkish), 0.5))
