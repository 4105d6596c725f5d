"""Promotion of versions that were evaluated on different held-out sets or by different judges."""

import sage.torchvision_ops  # noqa: F401

import evaluated
import pytest
import tracked
from tracked import aliases, database, project, register, weights  # noqa: F401

from flows.tracking import promotion
from sage.errors import RegistryError, SageError
from sage.evaluation.results import parse


@pytest.mark.slow
def test_a_version_of_another_day_is_promoted_if_both_are_judged_anew_and_it_is_not_worse(project, weights):
    def judged(ours: float, passed: bool = True) -> promotion.Judge:
        """Stand for a judging in which the champion has alignment 0.5 [0.45, 0.55], the other version `ours`."""

        def judge(versions):
            assert [str(version.version) for version in versions] == ["1", "2"]
            gates = [evaluated.verdict("alignment", passed=passed, reason="alignment is too low")]
            return [
                parse(
                    evaluated.results() | {"gates": gates, "arms": {"sage": {"alignment": tracked.figure(value)}}}, ""
                )
                for value in (0.5, ours)
            ]

        return judge

    register(weights)
    promotion.promote()
    register(weights, held_out="b" * 64)
    with pytest.raises(RegistryError, match=r"cannot be compared: .* different held-out sets, bbbbbbbbbbbb and aaaa"):
        promotion.promote()
    with pytest.raises(RegistryError, match=r"judged anew, failed a gate:\n  alignment is too low"):
        promotion.promote(judge=judged(0.5, passed=False))
    with pytest.raises(RegistryError, match=r"worse than champion 1:\n  alignment 0.3 \[0.25, 0.35\], champion 0.5"):
        promotion.promote(judge=judged(0.3))
    assert aliases()["champion"] == "1"
    assert promotion.promote(judge=judged(0.46)) == "2"
    assert aliases() == {"champion": "2"}


@pytest.mark.slow
def test_versions_of_different_judges_are_not_compared_by_their_recorded_figures(project, weights):
    register(weights)
    promotion.promote()
    register(weights, features="inception", measured_by={"features": "Inception"})
    with pytest.raises(RegistryError, match=r"different judges, .*inception.* and .*efficientnet_lite0"):
        promotion.promote()
    said = r"different judges, .* be judged anew: asked to judge\nA model for other images .*promote VERSION --to"
    with pytest.raises(RegistryError, match=said):
        promotion.promote(judge=ask)


def ask(versions):
    raise SageError("asked to judge")
