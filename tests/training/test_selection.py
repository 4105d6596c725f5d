import pytest

from sage.training.selection import LOSS, Measured, Validation


def history(*losses):
    return [Measured(10 * place, {LOSS: loss}) for place, loss in enumerate(losses)]


def validation(**settings):
    return Validation(dict, 10, **settings)


@pytest.mark.parametrize(
    ("losses", "patience", "ended"),
    [
        ((), 1, False),
        ((3,), 1, False),
        ((3, 2, 1), 1, False),
        ((3, 4), 1, True),
        ((3, 4), 2, False),
        ((3, 2, 4, 2), 2, True),  # as low as the best is not lower
        ((3, 2, 4, 1), 2, False),
        ((3, 4, 5, 6, 7), None, False),
    ],
)
def test_patience_counts_measurements_since_the_lowest(losses, patience, ended):
    assert validation(patience=patience).ended(history(*losses)) is ended


def test_the_kept_weights_are_the_last_or_the_earliest_of_the_lowest_loss():
    found = history(3, 1, 2, 1)
    assert validation().kept(found).step == 30 and validation(keep="best").kept(found).step == 10


def test_the_last_step_is_measured_too():
    assert [step for step in range(26) if validation().due(step, 25)] == [0, 10, 20, 25]
