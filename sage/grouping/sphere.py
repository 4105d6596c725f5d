"""The sphere on which predictions are compared: their cosine there says how far two lie apart in latents."""

import numpy as np


def on_sphere(rows: np.ndarray, latents: int) -> np.ndarray:
    """Return rows of length 1, (n, k + 1) float32, whose cosine is 1 - m / 4 for a mean squared difference m of two.

    rows     one prediction each, (n, k), in any orthonormal coordinates
    latents  d, the number of latents of a prediction; k may be less if all rows lie in a subspace

    Autoencoders scale latents to variance 1, so the scale is the same for all sets of prompts: m is 2 for unrelated
    images, and less for predictions, which are means. The last column gives all rows the length sqrt(2 d); it lowers
    the cosine of rows of different length a little. Longer rows are scaled.
    """
    rows = np.asarray(rows, np.float64)
    missing = np.sqrt(np.clip(2 * latents - np.square(rows).sum(1, keepdims=True), 0, None))
    lifted = np.concatenate([rows, missing], axis=1)
    found: np.ndarray = (lifted / np.linalg.norm(lifted, axis=1, keepdims=True)).astype(np.float32)
    return found
