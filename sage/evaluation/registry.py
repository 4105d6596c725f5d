"""The metrics: one table, read by the evaluation, the gates, the configuration, the report and the model registry.

To add a metric, add a row to METRICS and compute it: a quality metric in sage/evaluation/figures.py (`statistics`), a
cost in stage `generate` (metrics/generate.json). Tables, plots and gates then use it without another change.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

Interval = Literal["bootstrap", "jackknife", "exact"]


@dataclass(frozen=True)
class Metric:
    """One metric.

    name: its name in params.yaml and metrics/evaluate.json.
    label: its label for display, in the form used inside a sentence.
    higher_is_better: whether larger values are better.
    interval: how its interval is computed. "bootstrap": resampling of groups; "jackknife": leaving out blocks of
        groups; "exact": the metric is a cost that is counted, so the interval is a point.
    description: one line on what it measures.
    gateable: whether a gate may use it.
    by_similarity: whether the report also splits it by the similarity of the groups.
    within_groups: whether it compares images of one group, so that groups of one prompt do not count.
    """

    name: str
    label: str
    higher_is_better: bool
    interval: Interval
    description: str
    gateable: bool = False
    by_similarity: bool = False
    within_groups: bool = False

    @property
    def title(self) -> str:
        """The label with a capital first letter, for headings and the start of a sentence."""
        return self.label[0].upper() + self.label[1:]

    @property
    def cost(self) -> bool:
        """Whether the metric measures cost, not quality."""
        return self.interval == "exact"

    @property
    def direction(self) -> str:
        """The direction in words, such as "lower is better"."""
        return "lower is cheaper" if self.cost else "higher is better" if self.higher_is_better else "lower is better"

    def worse(self, ours: Any, theirs: Any) -> Any:
        """Return by how much the value `ours` is worse than `theirs` (negative: better); numbers or arrays."""
        return theirs - ours if self.higher_is_better else ours - theirs


METRICS = {
    metric.name: metric
    for metric in (
        Metric(
            "nfe_per_image",
            "network evaluations per image",
            False,
            "exact",
            "rows of all network calls over the number of images; twice as many under guidance",
            gateable=True,
        ),
        Metric(
            "kernel_distance",
            "kernel distance",
            False,
            "bootstrap",
            "unbiased polynomial MMD² between generated and real images, over all pairs of prompts",
            gateable=True,
            by_similarity=True,
        ),
        Metric(
            "alignment",
            "alignment",
            True,
            "bootstrap",
            "how well an image shows what its prompt says: attributes right, or a CLIP score",
            gateable=True,
            by_similarity=True,
        ),
        Metric(
            "group_diversity",
            "diversity within groups",
            True,
            "bootstrap",
            "mean feature distance of an image to the others of its group and seed",
            gateable=True,
            by_similarity=True,
            within_groups=True,
        ),
        Metric(
            "seed_diversity",
            "diversity over seeds",
            True,
            "bootstrap",
            "mean feature distance of an image to the images of its prompt from other seeds",
            gateable=True,
        ),
        Metric(
            "frechet_distance",
            "Fréchet distance",
            False,
            "jackknife",
            "mean over seeds; grows as n shrinks, so compare it with the real images at the same n",
        ),
    )
}
BOOTSTRAPPED = tuple(name for name, metric in METRICS.items() if metric.interval == "bootstrap")
GATEABLE = tuple(name for name, metric in METRICS.items() if metric.gateable)
BY_SIMILARITY = tuple(name for name, metric in METRICS.items() if metric.by_similarity)


# What metrics are called if these features or this judge computed them.
_NAMES = {
    "inception": {"frechet_distance": "FID", "kernel_distance": "KID"},
    "CLIP score": {"alignment": "CLIP score"},
    "attributes right": {"alignment": "attributes right"},
}


def named(*by: str) -> dict[str, Metric]:
    """Return the metrics with the labels that they have if `by`, names of features and judge, computed them."""
    labels = {metric: label for name in by for metric, label in _NAMES.get(name, {}).items()}
    return {name: replace(metric, label=labels.get(name, metric.label)) for name, metric in METRICS.items()}


def label(name: str, *by: str) -> str:
    """Return the display label of a metric; for a name that only an older run used, the name in words."""
    return named(*by)[name].label if name in METRICS else name.replace("_", " ")
