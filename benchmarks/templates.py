"""What the expansion of templates may say about groups: three rules, and what each saves.

    python -m benchmarks.templates [TEMPLATES]

TEMPLATES is a list of prompts, one template a line; without it, six templates of product and scene pictures.

| rule | prompts that may share |
|---|---|
| any | similar ones, of whichever template, as in a list of prompts |
| within | similar ones of the same template; this is what `sage generate --expand` does |
| whole | all of the same template, up to group.max_size, however different |

Threshold, size, guard and share ratio are those of params.yaml; saving is in network evaluations. `least` is the lowest
cosine of two prompts in a group, `loose` the fraction of pairs in groups below the threshold.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from flows.machine import embedding_cache
from flows.terminal import run
from sage.config import load_params
from sage.data.templates import expand
from sage.grouping.boilerplate import distinct
from sage.grouping.embedding import embed
from sage.grouping.groups import Groups
from sage.grouping.policy import ENCODER, Policy
from sage.sampling.plan import shared_steps

TEMPLATES = (
    "{red|blue|green|white} vase, {oil painting|photo|watercolour}",
    "a {cat|dog|horse} {sleeping|running|eating} {on a beach|in the snow}",
    "product photo of a {leather|canvas} {backpack|handbag|wallet}, white background, studio light",
    "a {cottage|castle|skyscraper} at {dawn|noon|night} in {winter|summer}",
    "portrait of a {young|old} {woman|man} with {glasses|a hat|red hair}, film grain",
    "a {bowl of soup|slice of cake|cup of coffee} on a {wooden|marble} table, {top view|side view}",
)


def rules(policy: Policy, texts: Sequence[str], rows: np.ndarray, keys: list[int], ratio: float) -> dict[str, Groups]:
    """Return the groups of prompts by each rule; `keys` holds the template of each prompt."""
    threshold = policy.choose_threshold(rows, ratio, Path("models/base"), texts, keys)
    everything = replace(policy, threshold=-1.0, saving=None, max_damage=None)
    return {
        "any": policy.form(texts, rows, threshold),
        "within": policy.form(texts, rows, threshold, keys),
        "whole": everything.form(texts, rows, -1.0, keys),
    }


def main(
    source: Annotated[Path | None, typer.Argument(metavar="TEMPLATES", help="One template a line.")] = None,
) -> None:
    """Print a row for each rule, and for each encoding of the prompts."""
    params = load_params()
    policy, steps = Policy(**params.group.model_dump()), params.generate.steps
    ratio = shared_steps(params.generate.share_ratio, steps) / steps
    found = expand(source.read_text(encoding="utf-8").splitlines() if source else TEMPLATES)
    table = Table("compared", "rule", "groups", "saving", "least", "loose", title=f"{len(found.prompts)} prompts")
    ways: dict[str, Callable[[Sequence[str]], list[str]]] = {"without boilerplate": distinct, "whole prompts": list}
    for way, texts in ways.items():
        rows = embed(texts(found.prompts), ENCODER, cache=embedding_cache())
        threshold = policy.choose_threshold(rows, ratio, Path("models/base"), found.prompts, found.templates)
        for rule, groups in rules(policy, found.prompts, rows, found.templates, ratio).items():
            pairs = np.array([rows[a] @ rows[b] for group in groups for a in group for b in group if a < b])
            saving = ratio * (1 - len(groups) / len(rows))
            loose = f"{(pairs < threshold).mean():.1%}"
            table.add_row(way, rule, str(len(groups)), f"{saving:.1%}", f"{pairs.min():.2f}", loose)
    Console(width=120).print(table)


if __name__ == "__main__":
    run(main)
