"""Seeds of images: functions of the run's seed and the prompt, independent of order, batch and the other prompts."""

import hashlib
from collections import Counter
from collections.abc import Sequence


def prompt_seed(seed: int, key: str) -> int:
    """Return the seed of one image: 63 bits of the SHA-256 of the run's seed and a key that identifies the image."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{key}".encode(errors="surrogatepass")).digest()[:8]) >> 1


def image_seeds(seed: int, prompts: Sequence[str]) -> list[int]:
    """Return the seed of each image, a function of its prompt and of how often that prompt came before in the list."""
    times: Counter[str] = Counter()
    seeds = []
    for prompt in prompts:
        seeds.append(prompt_seed(seed, f"{times[prompt]}:{prompt}"))
        times[prompt] += 1
    return seeds
