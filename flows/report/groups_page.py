"""A self-contained page with a 2-D map of prompts: similar prompts are close, and each group has its own colour."""

import json
from collections.abc import Sequence

import numpy as np
from jinja2 import Environment
from markupsafe import Markup

# t-SNE shows neighbours best, but takes a minute above this number of prompts; larger sets use two principal axes.
_NEIGHBOUR_MAP = 3000
ALONE = "#bbb"

_PAGE = Environment(autoescape=True).from_string("""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{{ title }}</title>
<style>
 body { font: 15px system-ui, sans-serif; margin: 2em auto; max-width: 72em; padding: 0 1em; color: #222 }
 canvas { width: 100%; border: 1px solid #ccc; cursor: crosshair }
 #text { min-height: 6em; white-space: pre-wrap; overflow-wrap: anywhere }
</style>
<h1>{{ title }}</h1>
<p>{{ summary }}</p>
{{ map }}
</html>
""")

_MAP = """<canvas id="map" width="1400" height="900"></canvas><div id="text">Point at a prompt.</div>
<script type="application/json" id="prompts">%s</script>
<script>
"use strict";
const { x, y, group, text, similarity } = JSON.parse(document.getElementById("prompts").textContent);
const canvas = document.getElementById("map"), pen = canvas.getContext("2d"), shown = document.getElementById("text");
const size = {}; for (const g of group) size[g] = (size[g] || 0) + 1;
const at = i => [20 + x[i] * (canvas.width - 40), 20 + y[i] * (canvas.height - 40)];
function draw(chosen) {
  pen.clearRect(0, 0, canvas.width, canvas.height);
  for (let i = 0; i < x.length; i++) {
    const [a, b] = at(i);
    pen.fillStyle = size[group[i]] < 2 ? "#bbb" : `hsl(${group[i] * 137.508 %% 360} 65%% 45%%)`;
    pen.beginPath(); pen.arc(a, b, group[i] === chosen ? 10 : 4, 0, 7); pen.fill();
  }
}
canvas.addEventListener("pointermove", event => {
  const box = canvas.getBoundingClientRect(), scale = canvas.width / box.width;
  const a = (event.clientX - box.left) * scale, b = (event.clientY - box.top) * scale;
  let near = 0, best = Infinity;
  for (let i = 0; i < x.length; i++) {
    const [c, d] = at(i), distance = (a - c) ** 2 + (b - d) ** 2;
    if (distance < best) { best = distance; near = i; }
  }
  const members = text.filter((_, i) => group[i] === group[near] && i !== near);
  const told = `group of ${size[group[near]]}, worst pair ${similarity[group[near]]}`;
  shown.textContent = [text[near], told, ...members].join("\\n");
  draw(group[near]);
});
draw(-1);
</script>"""


def groups_page(
    title: str,
    summary: str,
    prompts: Sequence[str],
    embeddings: np.ndarray,
    groups: Sequence[Sequence[int]],
    worst: Sequence[float],
) -> str:
    """Return the page as HTML.

    title       heading of the page
    summary     paragraph below the heading
    prompts     texts of the prompts
    embeddings  their sentence embeddings, (prompts, width)
    groups      indices of the prompts of each group
    worst       cosine of the least similar pair of prompts in each group
    """
    drawn = Markup(groups_map(prompts, embeddings, groups, worst))  # noqa: S704 prompts in it cannot end their element
    return _PAGE.render(title=title, summary=summary, map=drawn)


def groups_map(
    prompts: Sequence[str], embeddings: np.ndarray, groups: Sequence[Sequence[int]], worst: Sequence[float]
) -> str:
    """Return the interactive map alone, as an HTML fragment; arguments as in `groups_page`."""
    number = np.empty(len(prompts), np.int64)
    for g, members in enumerate(groups):
        number[list(members)] = g
    places = positions(embeddings)
    data = {
        "x": places[:, 0].round(4).tolist(),
        "y": places[:, 1].round(4).tolist(),
        "group": number.tolist(),
        "text": [prompt[:300].encode("utf-8", "replace").decode("utf-8") for prompt in prompts],
        "similarity": [round(value, 3) for value in worst],
    }
    # Escape every "<": a prompt could otherwise close the script element and inject HTML.
    return _MAP % json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")


_SVG = Environment(autoescape=True).from_string("""<svg class="map" viewBox="-8 -8 1016 616" role="img">
{%- for colour, members in groups %}<g fill="{{ colour }}">
{%- for x, y, text in members %}<circle cx="{{ x }}" cy="{{ y }}" r="5"><title>{{ text }}</title></circle>
{%- endfor %}</g>
{%- endfor %}</svg>""")


def groups_image(
    prompts: Sequence[str], embeddings: np.ndarray, groups: Sequence[Sequence[int]], worst: Sequence[float]
) -> Markup:
    """Return the same map as SVG for a page without scripts; texts are tooltips of the browser."""
    places = (positions(embeddings) * (1000, 600)).round(1).tolist()

    def told(member: int, g: int) -> str:
        others = [prompts[other] for other in groups[g] if other != member]
        return "\n".join([prompts[member], f"group of {len(groups[g])}, worst pair {worst[g]:.3f}", *others])

    drawn = [
        (colour(g) if len(members) > 1 else ALONE, [(*places[member], told(member, g)) for member in members])
        for g, members in enumerate(groups)
    ]
    return Markup(_SVG.render(groups=drawn))  # noqa: S704 - the template escapes the prompts


def colour(group: int) -> str:
    """Return a CSS colour for a group; hues advance by the golden angle, as in the page's script."""
    return f"hsl({group * 137.508 % 360:.1f} 65% 45%)"


def positions(embeddings: np.ndarray) -> np.ndarray:
    """Return map coordinates in [0, 1] of n prompts, shape (n, 2); deterministic for given embeddings (n, width)."""
    n = len(embeddings)
    centred = np.nan_to_num(embeddings, posinf=0, neginf=0) - np.nan_to_num(embeddings, posinf=0, neginf=0).mean(axis=0)
    if 10 <= n <= _NEIGHBOUR_MAP and np.ptp(centred) > 0:
        from sklearn.manifold import TSNE

        places = TSNE(perplexity=min(30, n / 4), init="random", random_state=0).fit_transform(centred)
    else:
        _, _, axes = np.linalg.svd(centred[:: max(1, n // _NEIGHBOUR_MAP)], full_matrices=False)
        places = centred @ axes[:2].T
        places = np.pad(places, ((0, 0), (0, 2 - places.shape[1])))
    low, high = places.min(axis=0), places.max(axis=0)
    return np.asarray((places - low) / np.where(high > low, high - low, 1))
