"""The arms: ways to generate the images of the same prompts and seeds, so that their figures can be compared.

Every part that names an arm reads it here: the stage that generates, gates, configuration, report and registry. The
metrics stand in a file of their own, sage/evaluation/registry.py: a new metric must not generate the images again.
"""

from dataclasses import dataclass

INDEPENDENT = "independent"
SAME_NFE = "independent_same_nfe"
SHARED = "shared"
SAGE = "sage"


@dataclass(frozen=True)
class Arm:
    """One arm: its name in files, its label for people, and one sentence on model, steps and what is shared."""

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
REFERENCES = tuple(name for name in ARMS if name != JUDGED)  # the arms that a gate may compare it with


def label(name: str) -> str:
    """Return what people read for an arm; a name that an older run recorded and this table lacks is spelled out."""
    return ARMS[name].label if name in ARMS else name.replace("_", " ").capitalize()
