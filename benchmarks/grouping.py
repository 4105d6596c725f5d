"""The figures of docs/grouping.md: `python -m benchmarks.grouping COMMAND`; embeddings are kept and runs resume."""

import csv
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import sage.torchvision_ops  # noqa: F401

import faiss
import numpy as np
import typer

from benchmarks import grouping_algorithms as others
from benchmarks.ambiguous import CONFUSED, MOVED, SAME
from benchmarks.grouping_embeddings import WORK, embeddings, tf_idf, word_vectors
from benchmarks.languages import SAID
from flows.terminal import exit_on_error as command
from sage.data.dataset import read_split
from sage.files import write_json
from sage.grouping import guard as ambiguity
from sage.grouping import neighbours
from sage.grouping.embedding import embed
from sage.grouping.groups import Groups, cut, group, tree, worst_similarity
from sage.grouping.neighbours import NEAREST, PROBES, similar_pairs
from sage.grouping.online import replay
from sage.grouping.thresholds import share_reaching, threshold_for_share

app = typer.Typer(no_args_is_help=True, help=__doc__)
MAX_SIZE = 6
WIDTH = 384  # of MiniLM's vectors
Find = Callable[[np.ndarray, float], tuple[np.ndarray, np.ndarray]]
# scipy's linkage, inside scikit-learn, holds all distances twice in double precision: 20 GB for 50,000 prompts.
ALL_DISTANCES = 20_000

Prompts = Annotated[Path | None, typer.Option(help="Your own list, one prompt a line, instead of composed captions.")]
Threshold = Annotated[float, typer.Option(help="Cosine that every pair of a group reaches.")]
Sizes = Annotated[str, typer.Option(help="Numbers of prompts, with commas.")]


@app.command()
def speed(sizes: Sizes = "10000", threshold: Threshold = 0.8, prompts: Prompts = None, stretched: Sizes = "") -> None:
    """Time from embeddings to groups and peak memory, each size in a process of its own.

    `--stretched` names sizes that are made from the largest of the others, where embedding them all would take hours:
    each row is used several times, with noise after which its copies have a cosine of about 0.83.
    """
    rows = []
    for size in [*_sizes(sizes), *(_sizes(stretched) if stretched else [])]:
        most = min(size, max(_sizes(sizes)))
        embeddings(most, prompts)  # made and kept before anything is timed
        rows.append(_alone("measure", size, threshold, prompts, most))
        _row(rows[-1])
        if len(rows) > 1:
            one, other = rows[-2:]
            growth = np.log(other["seconds"] / one["seconds"]) / np.log(other["prompts"] / one["prompts"])
            typer.echo(f"  grows as n^{growth:.2f}")


@app.command()
def dense(sizes: Sizes = "10000,50000", threshold: Threshold = 0.8) -> None:
    """CPU seconds and saving where rows have many more neighbours than are kept: one clump, and clusters of all sizes.

    Then a shop's template, 70 near-duplicates of each of 130 products, just below and above the size up to which all
    pairs are compared.
    """
    for name, make in {"one clump": _clump, "heavy-tailed clusters": _heavy_tailed}.items():
        for size in _sizes(sizes):
            x = make(size)
            start = time.process_time()
            groups = group(x, threshold, MAX_SIZE, 0.999)
            seconds = time.process_time() - start
            _row({"rows": name, "prompts": size, "CPU seconds": seconds, "saving": _saving(groups, size)})
    random = np.random.default_rng(0)
    kinds = random.normal(size=(130, WIDTH)) + 1.5 * random.normal(size=WIDTH)
    x = random.permutation((kinds[:, None] + 0.1 * random.normal(size=(130, 70, WIDTH))).reshape(-1, WIDTH))
    for size in (neighbours.ALL_PAIRS, neighbours.ALL_PAIRS + 1, len(x)):
        groups = group(x[:size], 0.5, MAX_SIZE, 0.95)
        _row({"rows": "near-duplicates", "prompts": size, "saving": _saving(groups, size)})


def _clump(size: int) -> np.ndarray:
    random = np.random.default_rng(1)
    middle = random.standard_normal(WIDTH)
    noise = random.standard_normal((size, WIDTH), np.float32)
    return np.asarray(middle / np.linalg.norm(middle) + 0.005 * noise, np.float32)


def _heavy_tailed(size: int) -> np.ndarray:
    """Return rows around a tenth as many middles, the k-th of which 1 / k as many rows have as the first."""
    random = np.random.default_rng(1)
    weight = 1 / np.arange(1, size // 10 + 1)
    middles = random.standard_normal((len(weight), WIDTH), np.float32)
    middles /= np.linalg.norm(middles, axis=1, keepdims=True)
    noise = random.standard_normal((size, WIDTH), np.float32)
    return np.asarray(middles[random.choice(len(weight), size, p=weight / weight.sum())] + 0.012 * noise, np.float32)


@app.command()
def rivals(sizes: Sizes = "10000", threshold: Threshold = 0.8, prompts: Prompts = None) -> None:
    """Compare time and saving with sentence-transformers' community detection and scikit-learn's agglomeration.

    The last is run up to 20,000 prompts; its seconds for more are those times the square of the sizes' ratio.
    """
    for size in _sizes(sizes):
        embeddings(size, prompts)
        for name in ("measure", "measure-communities", "measure-scikit-learn"):
            if name == "measure-scikit-learn" and size > ALL_DISTANCES:
                seconds = _alone(name, ALL_DISTANCES, threshold, prompts)["seconds"]
                typer.echo(f"  AgglomerativeClustering, extrapolated: {seconds * (size / ALL_DISTANCES) ** 2:.4g} s")
            else:
                _row(_alone(name, size, threshold, prompts))


@app.command()
def recall(sizes: Sizes = "20000", threshold: Threshold = 0.8, prompts: Prompts = None) -> None:
    """Say which neighbours the index misses, and what that costs in saving."""
    for size in _sizes(sizes):
        x = embeddings(size, prompts)
        a, b, _ = similar_pairs(x, threshold)
        saving = _saving(group(x, threshold, MAX_SIZE), size)
        neighbours.EXACT = size
        exact_a, exact_b, _ = similar_pairs(x, threshold)
        exact_saving = _saving(group(x, threshold, MAX_SIZE), size)
        found = len(np.intersect1d(a * np.int64(size) + b, exact_a * np.int64(size) + exact_b)) / max(len(exact_a), 1)
        _row({"prompts": size, "threshold": threshold, "nearest": NEAREST, "probes": PROBES, "recall": found,
              "saving": saving, "exact saving": exact_saving})  # fmt: skip


@app.command()
def algorithms(
    data: Annotated[Path | None, typer.Option(help="Prepared data: its validation and training captions.")] = None,
    size: Annotated[int, typer.Option(min=0, help="How many composed captions; 0: none.")] = 4000,
    prompts: Prompts = None,
    thresholds: Annotated[str, typer.Option(help="Cosines, with commas.")] = "0.5,0.6,0.7,0.8",
) -> None:
    """Compare ways to group: saving at the same worst pair, and how alike groups stay."""
    sets = {"composed": embeddings(size, prompts)} if size else {}
    for split in ("validation", "train") if data else ():
        assert data is not None
        texts = [example.text for example in read_split(data, split)]
        sets[split] = embed(texts, cache=WORK / "cache.sqlite")
    for name, x in sets.items():
        for threshold in map(float, thresholds.split(",")):
            _compare(name, x, threshold)


def _compare(name: str, x: np.ndarray, threshold: float) -> None:
    graph = others.graph_of(len(x), *similar_pairs(x, threshold))
    repair = _repair(x, threshold)
    greedy = others.greedy_cliques(graph, MAX_SIZE)
    runs: dict[str, Callable[[], Groups]] = {
        "sage.grouping.groups": lambda: group(x, threshold, MAX_SIZE),
        "complete linkage": lambda: _tree_cut(x, threshold),
        "greedy cliques": lambda: greedy,
        "greedy cliques, dissolved": lambda: others.dissolve(greedy, graph, MAX_SIZE),
        "colouring of the complement": lambda: others.colouring(graph, MAX_SIZE),
        "Leiden, repaired": lambda: others.leiden(graph, MAX_SIZE, repair),
        "community detection, repaired": lambda: others.communities(x, threshold, repair),
        "scikit-learn, repaired": lambda: others.scikit_learn(x, threshold, repair),
    }
    for algorithm, run in runs.items():
        groups = run()
        worst = worst_similarity(x, groups)
        shared = [value for value, members in zip(worst, groups, strict=True) if len(members) > 1]
        _row({"prompts": f"{name} {len(x)}", "threshold": threshold, "algorithm": algorithm,
              "saving": _saving(groups, len(x)), "worst": min(worst),
              "mean worst": float(np.mean(shared))})  # fmt: skip


@app.command()
def index(size: int = 20000, threshold: Threshold = 0.8, prompts: Prompts = None) -> None:
    """Compare indexes: seconds to find the neighbours of all rows, and how many of those that reach the threshold."""
    x = embeddings(size, prompts)
    wanted = _codes(*_faiss(faiss.IndexFlatIP(x.shape[1]))(x, threshold), size)
    for name, find in _INDEXES.items():
        start = time.perf_counter()
        a, b = find(x, threshold)
        seconds = time.perf_counter() - start
        found = np.intersect1d(_codes(a, b, size), wanted)
        _row({"index": name, "prompts": size, "seconds": seconds, "recall": len(found) / max(len(wanted), 1)})


@app.command()
def ambiguous(threshold: Threshold = 0.5) -> None:
    """Say how often the encoder takes different prompts for alike, and what the guard catches and costs."""
    kinds = {**CONFUSED, "the same, reworded": SAME, "the same, clauses moved": MOVED}
    texts = sorted({text for pairs in kinds.values() for pair in pairs for text in pair})
    row = dict(zip(texts, embed(texts, cache=WORK / "cache.sqlite"), strict=True))
    for kind, pairs in kinds.items():
        cosine = np.array([row[first] @ row[second] for first, second in pairs])
        alike = cosine >= threshold
        told = np.array([bool(ambiguity.differences(*pair)) for pair in pairs])
        _row({"kind": kind, "pairs": len(pairs), "mean cosine": float(cosine.mean()), "grouped": float(alike.mean()),
              "split by the guard": float((alike & told).sum() / max(alike.sum(), 1))})  # fmt: skip


@app.command()
def guarded(data: Annotated[Path, typer.Option(help="Prepared data.")], threshold: Threshold = 0.72) -> None:
    """Say what the guard costs in saving on real captions."""
    texts = [example.text for example in read_split(data, "validation")]
    groups = group(embed(texts, cache=WORK / "cache.sqlite"), threshold, MAX_SIZE)
    for kinds in [(kind,) for kind in ambiguity.KINDS] + [ambiguity.KINDS]:
        parts = ambiguity.guard(texts, groups, kinds)
        saving, without = _saving(parts, len(texts)), _saving(groups, len(texts))
        _row({"guard": ", ".join(kinds), "saving": saving, "without": without})


@app.command()
def judged(pairs: Path = Path("tests/grouping/guard_pairs.tsv")) -> None:
    """Say how often the guard errs on pairs with a human's verdict: different but missed, or alike but split."""
    with pairs.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    for name, share, about in sorted({(row["set"], row["share"], row["about"]) for row in rows}):
        found = [row for row in rows if (row["set"], row["share"], row["about"]) == (name, share, about)]
        wrong = sum(bool(ambiguity.differences(row["first"], row["second"])) == (share == "yes") for row in found)
        _row({"set": name, "may share": share, "about": about, "pairs": len(found), "wrong": wrong})


@app.command()
def languages(threshold: Threshold = 0.5) -> None:
    """Say what the encoder knows of other languages: own sentences, translated, reworded, and unrelated ones."""
    texts = sorted({text for said in SAID.values() for pair in said for text in pair})
    row = dict(zip(texts, embed(texts, cache=WORK / "cache.sqlite"), strict=True))
    for language, said in SAID.items():
        first, second = (np.array([row[pair[way]] for pair in said]) for way in (0, 1))
        english = np.array([row[pair[0]] for pair in SAID["English"]])
        reworded, translated = (first * second).sum(1), (first * english).sum(1)
        unrelated = np.concatenate([(first @ second.T)[~np.eye(len(said), dtype=bool)], _pairs(first), _pairs(second)])
        grouped = group(np.concatenate([first, second]), threshold, MAX_SIZE)
        mixed = sum(len({member % len(said) for member in members}) > 1 for members in grouped)
        _row({"language": language, "translated": float(translated.mean()), "reworded": float(reworded.mean()),
              "unrelated": float(unrelated.mean()), "reworded and grouped": float((reworded >= threshold).mean()),
              "unrelated and grouped": float((unrelated >= threshold).mean()),
              "groups": f"{sum(len(members) > 1 for members in grouped)}, {mixed} of them mixed"})  # fmt: skip


def _pairs(x: np.ndarray) -> np.ndarray:
    cosines: np.ndarray = x @ x.T
    return cosines[np.triu_indices(len(x), 1)]


@app.command()
def encoders(
    data: Annotated[Path, typer.Option(help="Prepared data.")], split: str = "validation", threshold: Threshold = 0.5
) -> None:
    """Say what a threshold of MiniLM is worth for another encoder, and what calibration makes of it.

    The others are what is at hand without a download: words counted (TF-IDF), and MiniLM's word vectors, averaged
    before its first layer, which all lean one way.
    """
    texts = [example.text for example in read_split(data, split)]
    first = embed(texts, cache=WORK / "cache.sqlite")
    wanted = share_reaching(first, threshold)
    for name, x in {"MiniLM": first, "TF-IDF": tf_idf(texts), "MiniLM's word vectors": word_vectors(texts)}.items():
        calibrated = threshold_for_share(x, wanted)
        for how, at in (("as it is", threshold), ("calibrated", calibrated)):
            groups = group(x, at, MAX_SIZE)
            _row({"encoder": name, "threshold": how, "cosine": at, "pairs reaching": share_reaching(x, at),
                  "saving": _saving(groups, len(texts)), "worst in MiniLM": _worst(first, groups)})  # fmt: skip


def _worst(x: np.ndarray, groups: Groups) -> float:
    """Return the mean over groups of two or more of the worst pair's cosine."""
    shared = [members for members in groups if len(members) > 1]
    return float(np.mean(worst_similarity(x, shared))) if shared else 1.0


@app.command()
def streaming(size: int = 2000, threshold: Threshold = 0.7, prompts: Prompts = None, seed: int = 0) -> None:
    """Compare the saving of a stream, in random order, one prompt a second, with that of the whole set."""
    x = embeddings(size, prompts)[np.random.default_rng(seed).permutation(size)]
    for window in (16, 64, 256, 1024, size):
        start = time.process_time()
        _, streamed, whole = replay(x, range(size), threshold, MAX_SIZE, wait=float(size), window=window)
        _row({"prompts": size, "window": window, "saving": streamed, "whole set": whole,
              "CPU ms a prompt": 1000 * (time.process_time() - start) / size})  # fmt: skip


def _codes(a: np.ndarray, b: np.ndarray, size: int) -> np.ndarray:
    """Return pairs as numbers, each pair of different rows once."""
    codes = np.unique(np.minimum(a, b) * np.int64(size) + np.maximum(a, b))
    different: np.ndarray = codes[codes // size != codes % size]
    return different


def _files(probes: int) -> Find:
    def find(x: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray]:
        neighbours.PROBES = probes
        a, b, _ = neighbours.ivf_pairs(x, threshold)
        return a, b

    return find


def _faiss(index: faiss.Index, train: bool = False) -> Find:
    def find(x: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray]:
        if train:
            index.train(x)
        index.add(x)
        cosine, other = index.search(x, NEAREST + 1)
        row, place = np.nonzero(cosine >= threshold)
        return row, other[row, place]

    return find


def _inverted_file(probes: int, files: int = 447) -> Find:
    quantizer = faiss.IndexFlatIP(WIDTH)
    index = faiss.IndexIVFScalarQuantizer(
        quantizer, WIDTH, files, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT, False
    )
    index.nprobe, index.cp.niter, index.cp.max_points_per_centroid = probes, 2, 32
    return _faiss(index, train=True)


def _faiss_graph() -> Find:
    index = faiss.IndexHNSWFlat(WIDTH, 16, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction, index.hnsw.efSearch = 40, 32
    return _faiss(index)


def _usearch(x: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    from usearch.index import Index  # type: ignore[import-not-found]

    index = Index(ndim=WIDTH, metric="ip", dtype="f16", connectivity=16, expansion_add=40, expansion_search=32)
    index.add(np.arange(len(x)), x)
    found = index.search(x, NEAREST + 1)
    row, place = np.nonzero(1 - found.distances >= threshold)
    return row, found.keys[row, place].astype(np.int64)


_INDEXES = {
    "files, 8 probes": _files(8),
    "files, 20 probes": _files(20),
    "faiss inverted file, 16 probes": _inverted_file(16),
    "faiss inverted file, 32 probes": _inverted_file(32),
    "faiss HNSW (M 16, ef 32)": _faiss_graph(),
    "usearch HNSW (M 16, ef 32, half precision)": _usearch,
}


@app.command(hidden=True)
def measure(
    out: Path, name: str, size: int, threshold: float, most: int, prompts: Annotated[Path | None, typer.Option()] = None
) -> None:
    """Measure one way once, in this process."""
    x = embeddings(most, prompts)
    if size > most:
        x = _stretched(x, size)
    before = time.perf_counter()
    groups = {"measure": _ours, "measure-communities": _communities, "measure-scikit-learn": _agglomeration}[name](
        x, threshold
    )
    seconds = time.perf_counter() - before
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux
    if name != "measure":  # not timed: a fair saving needs groups of the same cap and the same worst pair
        repair = _repair(x, threshold)
        groups = [part for members in groups for part in repair(members)]
    write_json(out, {"algorithm": {"measure": "sage.grouping.groups", "measure-communities": "community_detection",
                                   "measure-scikit-learn": "AgglomerativeClustering"}[name],
                     "prompts": size, "threshold": threshold, "seconds": seconds, "peak GiB": peak,
                     "saving": _saving(groups, size)})  # fmt: skip


def _ours(x: np.ndarray, threshold: float) -> Groups:
    return group(x, threshold, MAX_SIZE)


def _communities(x: np.ndarray, threshold: float) -> Groups:
    return others.communities(x, threshold, lambda members: [list(members)])


def _agglomeration(x: np.ndarray, threshold: float) -> Groups:
    return others.scikit_learn(x, threshold, lambda members: [list(members)])


def _tree_cut(x: np.ndarray, threshold: float) -> Groups:
    return cut(tree(x, threshold, MAX_SIZE), threshold)


def _repair(x: np.ndarray, threshold: float) -> Callable[[Any], Groups]:
    """Return what splits any set of rows into groups of the threshold and the cap."""

    def repair(members: Any) -> Groups:
        rows = sorted(members)
        return [[rows[place] for place in part] for part in group(x[rows], threshold, MAX_SIZE)]

    return repair


def _stretched(x: np.ndarray, size: int) -> np.ndarray:
    random = np.random.default_rng(0)
    rows = np.empty((size, x.shape[1]), np.float32)
    for start in range(0, size, len(x)):
        part = x[: size - start]
        noise = random.standard_normal(part.shape, np.float32) * np.float32(0.45 / np.sqrt(x.shape[1]))
        rows[start : start + len(part)] = part + noise
    return rows


def _alone(name: str, size: int, threshold: float, prompts: Path | None, most: int = 0) -> dict[str, Any]:
    out = WORK / "result.json"
    arguments = [sys.executable, "-m", "benchmarks.grouping", "measure", str(out), name, str(size), str(threshold)]
    arguments.append(str(most or size))
    subprocess.run([*arguments, *(["--prompts", str(prompts)] if prompts else [])], check=True)
    result: dict[str, Any] = json.loads(out.read_text())
    return result


def _saving(groups: Groups, size: int) -> float:
    return 1 - len(groups) / size


def _sizes(text: str) -> list[int]:
    return [int(size) for size in text.split(",")]


def _row(values: dict[str, Any]) -> None:
    """Print a row, ready for a table."""
    typer.echo(
        "| " + " | ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items()) + " |"
    )


if __name__ == "__main__":
    command(app)
