"""The arms: the sampling methods that are compared on the same prompts and seeds.

The names of arms are defined only here; stage `generate`, the gates, the configuration, the report and the model
registry all use this table. Metrics have their own table in sage/evaluation/registry.py, so that adding a metric does
not make stage `generate` run again.
"""

from dataclasses import dataclass

INDEPENDENT = "independent"
SAME_NFE = "independent_same_nfe"
SHARED = "shared"
SAGE = "sage"


@dataclass(frozen=True)
class Arm:
    """One arm: its name in files, its label for display, and one sentence on model, steps and what is shared."""

    name: str
    label: str
    sentence: str


ARMS = {
    arm.name: arm
    for arm in (
        Arm(INDEPENDENT, "Independent", "The base model takes all steps for every prompt; nothing is shared."),
        Arm(
            SAME_NFE,
            "Independent, same NFE",
            "The base model takes fewer steps, about as many evaluations as sharing (rounded up); nothing is shared.",
        ),
        Arm(SHARED, "Shared", "The base model takes all steps; the prompts of a group share the first ones."),
        Arm(SAGE, "SAGE", "The fine-tuned model takes all steps; the prompts of a group share the first ones."),
    )
}
JUDGED = SAGE  # the arm that must pass the gates
REFERENCES = tuple(name for name in ARMS if name != JUDGED)  # the arms that a gate may compare JUDGED with


def label(name: str) -> str:
    """Return the display label of an arm; for a name that only an older run used, the name in words."""
    return ARMS[name].label if name in ARMS else name.replace("_", " ").capitalize()
