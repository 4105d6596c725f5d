import numpy as np
import pytest

from sage.errors import ConfigurationError
from sage.grouping.policy import Policy
from sage.sampling.plan import Plan, shared_steps


@pytest.fixture(scope="module")
def prompts():
    random = np.random.default_rng(0)
    x = random.normal(size=(60, 16))[random.integers(60, size=240)] + 0.25 * random.normal(size=(240, 16))
    texts = [f"{'two' if k % 2 else 'three'} red things, kind {'abcdefgh'[k % 8]}" for k in range(240)]
    return texts, (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("guard", [None, ["number"]])
@pytest.mark.parametrize("share_ratio, steps", [(0.34, 6), (0.4, 6), (0.4, 10), (0.4, 50), (0.49, 4), (0.5, 3)])
def test_the_plan_that_is_drawn_meets_the_budget(prompts, guard, share_ratio, steps):
    texts, embeddings = prompts
    for saving in (0.1, 0.2, 0.25):
        policy = Policy(6, 0.999, saving=saving, guard=guard)
        ratio = shared_steps(share_ratio, steps) / steps
        try:
            threshold = policy.choose_threshold(embeddings, ratio, texts=texts)
        except ConfigurationError as error:
            assert "allow 0." in str(error)
            most = ratio * (1 - len(policy.form(texts, embeddings, 0.0)) / len(texts))
            assert most < saving
        else:
            plan = Plan.shared(policy.form(texts, embeddings, threshold), steps, share_ratio)
            assert plan.saving >= saving - 1e-9


def test_no_shared_step_saves_nothing(prompts):
    _, embeddings = prompts
    with pytest.raises(ConfigurationError, match=r"allow 0\.0000 at share ratio 0, counted in whole steps"):
        Policy(6, 0.999, saving=0.1).choose_threshold(embeddings, shared_steps(0.3, 3) / 3)


def test_a_budget_with_a_guard_needs_the_words(prompts):
    with pytest.raises(ConfigurationError, match="give texts"):
        Policy(6, 0.999, saving=0.1, guard=["number"]).choose_threshold(prompts[1], 0.4)
