"""Reads the images to evaluate, and checks that none is missing, altered or generated with other groups."""

import hashlib
from collections import Counter, defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from sage.data.dataset import Example, read_split
from sage.data.groups import read_groups
from sage.data.images import is_blank
from sage.errors import MetricError
from sage.evaluation.manifest import MANIFEST, Line, image_path, read_manifest, read_unread
from sage.evaluation.results import JudgedSet
from sage.files import digest, sha256


@dataclass(frozen=True)
class Judged:
    """The images to evaluate.

    examples: held-out real images with their prompts.
    groups: row numbers in `examples` of each group.
    similarity: cosine of the least similar pair of prompts in each group.
    seeds: the seeds of each prompt.
    arms: paths of the generated images by arm, as [prompt][seed].
    blank: number of images of a single colour, by arm, of the arms that have any.
    unread: number of tokens that the text encoder leaves out, by prompt id, of the prompts that it cuts.
    set: identity of the set, as recorded in the results.
    """

    examples: list[Example]
    groups: list[list[int]]
    similarity: list[float]
    seeds: list[int]
    arms: dict[str, list[list[Path]]]
    blank: dict[str, int]
    unread: dict[str, int]
    set: JudgedSet


def read_judged(data: Path, groups: Path, generated: Path, split: str, seeds: Sequence[int]) -> Judged:
    """Return the images to evaluate, after comparing the SHA-256 of every generated image with the manifest.

    Raises MetricError if the split is empty, or if images are missing, duplicated, unexpected, altered, or were
    generated with other groups; raises DataError if the groups are not a partition of the split. `data`, `groups` and
    `generated` are the output folders of the stages.
    """
    examples = read_split(data, split)
    if not examples:
        raise MetricError(f"split {split} of {data} is empty, so there is nothing to evaluate; hold some images out.")
    partition, similarity = read_groups(groups / f"{split}.json", examples)
    arms = _read_arms(generated, [example.id for example in examples], partition, seeds)
    prompts = [[example.id, example.text, hashlib.sha256(example.image.read()).hexdigest()] for example in examples]
    ids = [[examples[row].id for row in group] for group in partition]
    identity = JudgedSet(
        digest=digest({"prompts": prompts, "groups": ids, "seeds": list(seeds)}),
        generated=sha256(generated / MANIFEST),
        n_real=len(examples),
        n_prompts=len(examples),
        seeds=list(seeds),
    )
    blank = {arm: sum(_blank(path) for row in rows for path in row) for arm, rows in arms.items()}
    return Judged(
        examples,
        partition,
        similarity,
        list(seeds),
        arms,
        {arm: number for arm, number in blank.items() if number},
        read_unread(generated),
        identity,
    )


def siblings(held_out: Sequence[Example], training: Sequence[Example]) -> list[Example]:
    """Return a different training image for each held-out image, of the same family as long as there are any.

    If there are fewer training images than held-out images, only the first held-out images get one.
    """
    families: dict[str, deque[Example]] = defaultdict(deque)
    for example in training:
        families[example.family].append(example)
    wanted = held_out[: len(training)]
    found = [families[example.family].popleft() if families[example.family] else None for example in wanted]
    spare = iter([example for family in families.values() for example in family])
    return [example or next(spare) for example in found]


def _read_arms(
    folder: Path, ids: Sequence[str], groups: Sequence[Sequence[int]], seeds: Sequence[int]
) -> dict[str, list[list[Path]]]:
    manifest = folder / MANIFEST
    lines = read_manifest(folder)
    arms = list(dict.fromkeys(line.arm for line in lines))
    found = Counter((line.arm, line.seed, line.id) for line in lines)
    expected = Counter((arm, seed, id) for arm in arms for seed in seeds for id in ids)
    if found != expected:
        missing, foreign = sorted(expected - found), sorted(found - expected)
        raise MetricError(
            f"{manifest} names {len(lines)} pictures, expected {len(ids)} prompts x {len(seeds)} seeds for each of "
            f"{len(arms)} arms: {_some('missing', missing)}, {_some('foreign or double', foreign)}. "
            "Run `dvc repro generate`."
        )
    _check_groups(lines, [[ids[row] for row in group] for group in groups], manifest)
    paths = {arm: [[image_path(folder, arm, seed, id) for seed in seeds] for id in ids] for arm in arms}
    listed = {path for rows in paths.values() for row in rows for path in row}
    extra = sorted(str(path.relative_to(folder)) for path in set(folder.rglob("*.png")) - listed)
    altered = sorted(
        f"{line.arm}/seed-{line.seed}/{line.id}"
        for line in lines
        if not _intact(image_path(folder, line.arm, line.seed, line.id), line.sha256)
    )
    if extra or altered:
        raise MetricError(
            f"{folder} does not agree with its manifest: {_some('missing or altered', altered)}, "
            f"{_some('not listed', extra)}. Run `dvc repro --force generate`."
        )
    return paths


def _check_groups(lines: Sequence[Line], groups: Sequence[Sequence[str]], manifest: Path) -> None:
    """Raise MetricError if images were generated with other groups; arms without sharing have no groups to check."""
    labelled: dict[tuple[str, int], dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
    for line in lines:
        if line.group is not None:
            labelled[line.arm, line.seed][line.group].add(line.id)
    expected = {frozenset(group) for group in groups}
    for (arm, seed), found in labelled.items():
        if {frozenset(group) for group in found.values()} != expected:
            raise MetricError(
                f"{manifest}: arm {arm}, seed {seed} was made with other groups than the ones at hand. "
                "Run `dvc repro generate`."
            )


def _intact(path: Path, expected: str) -> bool:
    return path.is_file() and sha256(path) == expected


def _blank(path: Path) -> bool:
    with Image.open(path) as image:
        return is_blank(image)


def _some(what: str, items: Sequence[object]) -> str:
    shown = ", ".join(str(item) for item in items[:3]) + (", ..." if len(items) > 3 else "")
    return f"{len(items)} {what}" + (f" ({shown})" if items else "")
