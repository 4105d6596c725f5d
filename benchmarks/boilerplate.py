"""What prompts have in common, taken off in several ways before grouping: `python -m benchmarks.boilerplate`."""

import itertools
from collections.abc import Callable, Sequence

import sage.torchvision_ops  # noqa: F401

import numpy as np
import typer

from benchmarks.grouping_embeddings import WORK
from sage.grouping.boilerplate import distinct, mean_cosine
from sage.grouping.embedding import embed
from sage.grouping.groups import group
from sage.grouping.policy import ENCODER

THRESHOLD, MAX_SIZE, NEAR_DUPLICATE = 0.5, 6, 0.999
SUBJECTS = [
    "1girl, solo, silver hair, red eyes, school uniform",
    "1boy, knight, plate armor, holding sword",
    "dragon, flying, breathing fire, mountains",
    "cat, sitting, windowsill, rain",
    "spaceship, nebula, stars",
    "bowl of ramen, steam, chopsticks",
    "old man, beard, fisherman, boat",
    "city street, neon lights, night, rain",
    "forest, sunbeams, moss, no humans",
    "sports car, red, drifting",
    "robot, rusty, garden, flowers",
    "castle, cliff, sunset",
    "wolf, snow, full moon",
    "elf, archer, forest",
    "mermaid, coral reef, underwater",
    "samurai, cherry blossoms, katana",
    "portrait of a woman, freckles, green eyes",
    "piano, empty hall, dust",
    "teapot, steampunk, gears",
    "whale, floating in the sky, clouds",
    "desert, camel caravan, dunes",
    "skeleton, throne, crown",
    "baby panda, bamboo",
    "motorcycle, highway, desert",
    "witch, cauldron, potion",
    "library, spiral staircase, books",
    "astronaut, moon surface, earth",
    "horse, gallop, beach",
    "tiger, jungle, stalking",
    "house, cottage, garden, chimney",
]
PLACES = ["in the snow", "in a forest", "at the sea", "at night", "in a town", "on a hill", "in the desert",
          "by a river", "in a garden", "under a tree"]  # fmt: skip
FOXES = [f"a {kind} fox {place}" for kind in ("red", "small", "sleeping") for place in PLACES]
FORMS = {
    "short tags": "masterpiece, best quality, {}, 8k, highly detailed, trending on artstation",
    "long tags": "masterpiece, best quality, ultra-detailed, {}, 8k, highly detailed, sharp focus, intricate, "
    "trending on artstation, artstation hq, octane render, unreal engine 5, cinematic lighting, volumetric light, "
    "concept art, smooth, illustration",
    "weights and LoRA": "(masterpiece:1.3), (best quality:1.2), <lora:epiNoiseoffset_v2:0.8>, <lora:add_detail:0.6>, "
    "({}:1.2), BREAK, (detailed background:1.1), soft light, <lora:LowRA:0.5>",
    "JSON": '{{"subject": "{}", "style": "photo", "camera": {{"lens": "50mm", "aperture": "f/1.8"}}, '
    '"lighting": "soft", "aspect": "16:9"}}',
    "a sentence": "a highly detailed photograph of {} with dramatic lighting in the style of a famous painter",
    "options": "{} --ar 16:9 --v 5 --q 2 --stylize 750",
}


def _drawn(subjects: Sequence[str]) -> list[str]:
    """Return each subject with nine of the long form's tags, drawn anew for each."""
    random = np.random.default_rng(0)
    tags = [tag for tag in FORMS["long tags"].split(", ") if tag != "{}"]
    chosen = (random.permutation(tags)[:9].tolist() for _ in subjects)
    return [", ".join([*some[:3], subject, *some[3:]]) for subject, some in zip(subjects, chosen, strict=True)]


def _filled(form: str, subjects: Sequence[str]) -> list[str]:
    return [FORMS[form].format(subject) for subject in subjects]


# The bare subjects, and the prompts with what was put around them.
SETS: dict[str, tuple[Sequence[str], Sequence[str]]] = {
    "30 subjects": (SUBJECTS, SUBJECTS),
    **{f"30 subjects, {form}": (SUBJECTS, _filled(form, SUBJECTS)) for form in FORMS},
    "30 subjects, nine tags drawn": (SUBJECTS, _drawn(SUBJECTS)),
    "30 subjects, half with long tags": (SUBJECTS, [*_filled("long tags", SUBJECTS[:15]), *SUBJECTS[15:]]),
    "30 foxes": (FOXES, FOXES),
    "30 foxes, long tags": (FOXES, _filled("long tags", FOXES)),
    "30 foxes, as tags": (FOXES, [fox.removeprefix("a ").replace(" fox ", ", fox, ") for fox in FOXES]),
    "2 foxes, long tags": (FOXES[:2], _filled("long tags", FOXES[:2])),
    "5 foxes": (FOXES[:5], FOXES[:5]),
    "5 subjects, long tags": (SUBJECTS[:5], _filled("long tags", SUBJECTS[:5])),
}


def _embedded(texts: Sequence[str]) -> np.ndarray:
    return embed(texts, ENCODER, cache=WORK / "cache.sqlite")


def _unit(x: np.ndarray) -> np.ndarray:
    return np.asarray(x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-6), np.float32)


def _mean_off(texts: Sequence[str], doubt: float = 0) -> np.ndarray:
    x = _embedded(texts)
    return _unit(x - x.mean(axis=0) * len(x) / (len(x) + doubt))


def _first_component_off(texts: Sequence[str]) -> np.ndarray:
    x = _embedded(texts)
    first = np.linalg.svd(x, full_matrices=False)[2][0]
    return _unit(x - np.outer(x @ first, first))


WAYS: dict[str, Callable[[Sequence[str]], np.ndarray]] = {
    "as it is": _embedded,
    "mean off": _mean_off,
    "mean off, n / (n + 8)": lambda texts: _mean_off(texts, 8),
    "first component off": _first_component_off,
    "phrases cut": lambda texts: _embedded(distinct(texts)),
}


def main() -> None:
    """Print for each set and way the number of groups, and the pairs in groups that the bare subjects allow."""
    typer.echo(f"| prompts | mean cosine | bare | {' | '.join(WAYS)} |\n|{'---|' * (len(WAYS) + 3)}")
    for name, (bare, prompts) in SETS.items():
        truth = _embedded(bare)
        cells = []
        for way in WAYS.values():
            groups = group(way(prompts), THRESHOLD, MAX_SIZE, NEAR_DUPLICATE)
            pairs = [pair for members in groups for pair in itertools.combinations(members, 2)]
            right = sum(float(truth[a] @ truth[b]) >= THRESHOLD for a, b in pairs)
            cells.append(f"{len(groups)}" + (f" ({right / len(pairs):.0%})" if pairs else ""))
        alone = len(group(truth, THRESHOLD, MAX_SIZE, NEAR_DUPLICATE))
        typer.echo(f"| {name} | {mean_cosine(_embedded(prompts)):.2f} | {alone} | {' | '.join(cells)} |")


if __name__ == "__main__":
    typer.run(main)
