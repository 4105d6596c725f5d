"""From input rows to a prepared folder: checks every image and caption, accounts for every row, assigns splits."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import SEEK_END, BytesIO
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

from PIL import Image

from sage.data.accounting import write_accounting
from sage.data.buckets import Size, cut_off, named, nearest_bucket
from sage.data.captions import clean_caption
from sage.data.dataset import SMALL_FAMILY, SPLITS, assign_splits, write_sums
from sage.data.duplicates import first_alike, perceptual_hash
from sage.data.images import Resize, compose, decode, pixel_hash
from sage.data.rows import MAX_BYTES, Rejected, Row
from sage.data.shards import write_shards
from sage.errors import DataError
from sage.files import new_folder, sha256_tree

_MEASURED = 16  # images whose prepared bytes stand for those of all


def prepare(
    rows: Sequence[Row],
    folder: Path,
    *,
    size: int,
    resize: Resize,
    validation: float,
    test: float,
    seed: int,
    buckets: Sequence[Size] = (),
    near_duplicate: int | None = None,
    advance: Callable[[int], None] = lambda n: None,
) -> dict[str, Any]:
    """Write a prepared folder, atomically, and return the counts of kept, rejected and duplicate rows.

    rows              input rows, unchecked
    folder            folder to write; an existing one is replaced
    size              side of the square images in pixels
    resize            how an image of another shape becomes one of this shape: "crop" or "pad", see `compose`
    validation, test  fractions of each family to hold out, see `assign_splits`; unused for a split that rows name
    seed              seed of that choice
    buckets           sizes of the images of split train, see `bucket_sizes`; none: square, as the held-out images
    near_duplicate    images whose perceptual hashes differ in at most this many of 64 bits are never in two splits;
                      None: only equal images are not
    advance           called with the number of rows finished since its last call

    A duplicate has the same pixels and the same caption as an earlier row. If rows name their splits, an image in
    several of them stays in the held-out one. Raises DataError if no row can be used or a split would be empty.
    """
    with new_folder(folder) as temporary, TemporaryFile(dir=temporary) as file:
        images = _Spool(file)
        entries = _screen(rows, images, _Form(size, resize, buckets), near_duplicate is not None, advance)
        entries = _without_overlap(entries, _looks(entries, near_duplicate))
        kept = [entry for entry in entries if entry["status"] == "kept"]
        if not kept:
            raise DataError(_nothing_kept(rows, entries))
        splits = _splits(kept, _looks(kept, near_duplicate), validation, test, seed)
        counts = {split: splits.count(split) for split in SPLITS}
        if not all(counts.values()):
            raise DataError(_empty_split(counts, validation, test))
        for entry, split in zip(kept, splits, strict=True):
            entry["split"] = split
            if split != "train":
                entry.pop("bucket", None)
        for split in SPLITS:
            own = sorted(
                (entry for entry in kept if entry["split"] == split), key=lambda entry: entry.get("bucket", ())
            )
            write_shards(temporary / split, (row for entry in own for row in _written(entry, images)))
        write_accounting(temporary, entries)
        write_sums(temporary)
    return _summary(entries, counts, size, resize) | {"digest": sha256_tree(folder)}


def disk_needed(rows: Sequence[Row], *, size: int, resize: Resize, buckets: Sequence[Size] = ()) -> int:
    """Return about how many bytes `prepare` fills while it works, by the images of a few rows spread over all.

    An image is in a shard and, until all splits are known, in a temporary file; with buckets there in both its shapes.
    """
    form, needed, measured = _Form(size, resize, buckets), 0, 0
    for row in rows[:: max(1, len(rows) // _MEASURED)]:
        try:
            shapes, _ = _check(row, form)
        except Rejected:
            continue
        measured += 1
        encoded = []
        for image in shapes:
            image.save(file := BytesIO(), "PNG")
            encoded.append(file.tell())
        needed += sum(encoded) + max(encoded)
    return needed * len(rows) // max(1, measured)


@dataclass(frozen=True)
class _Form:
    """What an image becomes: a square of this size and, if there are buckets, an image of the nearest one."""

    size: int
    resize: Resize
    buckets: Sequence[Size]

    def shapes(self, image: Image.Image) -> tuple[list[Image.Image], Size | None]:
        """Return the square, then the image of its bucket if that is another shape; and the bucket, if there is one."""
        square = self.size, self.size
        bucket = nearest_bucket(self.buckets, (image.height, image.width)) if self.buckets else None
        return [compose(image, size, self.resize) for size in dict.fromkeys((square, bucket or square))], bucket


class _Spool:
    """The encoded images that are kept, in one file, until all rows are read and their splits are known."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._spans = file, dict[str, list[tuple[int, int]]]()

    def write(self, id: str, shapes: Sequence[Image.Image]) -> None:
        self._spans[id] = []
        for image in shapes:
            start = self._file.seek(0, SEEK_END)
            image.save(self._file, "PNG")
            self._spans[id].append((start, self._file.tell() - start))

    def read(self, id: str, shape: int) -> bytes:
        start, length = self._spans[id][shape]
        self._file.seek(start)
        return self._file.read(length)


def _screen(
    rows: Sequence[Row], images: _Spool, form: _Form, hashed: bool, advance: Callable[[int], None]
) -> list[dict[str, Any]]:
    """Return the accounting entry of each row, `hashed` perceptually or not, and write what is kept into the spool."""
    entries: list[dict[str, Any]] = []
    first: dict[tuple[str, str], str] = {}
    for row in rows:
        entry: dict[str, Any] = {"id": row.id, "file": row.file}
        try:
            shapes, found = _check(row, form)
        except Rejected as rejected:
            entry |= {"status": "rejected", "reason": rejected.reason, "detail": rejected.detail}
        else:
            key = (found["pixels"], found["text"])
            if key in first:
                entry |= {"status": "duplicate", "of": first[key]}
            else:
                first[key] = row.id
                entry |= {"status": "kept"} | found
                entry |= {"dhash": f"{perceptual_hash(shapes[0]):016x}"} if hashed else {}
                images.write(row.id, shapes)
        entries.append(entry)
        advance(1)
    return entries


def _written(entry: dict[str, Any], images: _Spool) -> Iterator[dict[str, Any]]:
    """Yield the rows to write for a kept entry: one, or as many as it counts in training."""
    row = entry | {"image": images.read(entry["id"], -1 if "bucket" in entry else 0)}
    yield row
    for number in range(2, 1 + (entry.get("repeats", 1) if entry["split"] == "train" else 1)):
        yield row | {"id": f"{entry['id']}-again-{number}"}


def _looks(entries: Sequence[dict[str, Any]], near_duplicate: int | None) -> dict[str, str]:
    """Return for each id of a kept entry what is equal for images that must not be in two splits."""
    kept = [entry for entry in entries if entry["status"] == "kept"]
    if near_duplicate is None:
        return {entry["id"]: entry["pixels"] for entry in kept}
    first = first_alike([int(entry["dhash"], 16) for entry in kept], near_duplicate)
    return {entry["id"]: kept[number]["pixels"] for entry, number in zip(kept, first, strict=True)}


def _without_overlap(entries: list[dict[str, Any]], looks: Mapping[str, str]) -> list[dict[str, Any]]:
    """Reject rows whose image the user put into several splits, except in the one that is held out most strictly."""
    splits: dict[str, set[str]] = defaultdict(set)
    for entry in entries:
        if "split" in entry:
            splits[looks[entry["id"]]].add(entry["split"])
    strictest = {look: max(found, key=SPLITS.index) for look, found in splits.items()}
    result = []
    for entry in entries:
        other = strictest[looks[entry["id"]]] if "split" in entry else None
        if other not in (None, entry.get("split")):
            detail = f"the same image, or one like it, is in {other}, and this row is in {entry['split']}"
            entry = {"id": entry["id"], "file": entry["file"], "status": "rejected"}
            entry |= {"reason": "split_overlap", "detail": detail}
        result.append(entry)
    return result


def _splits(
    kept: Sequence[dict[str, Any]], looks: Mapping[str, str], validation: float, test: float, seed: int
) -> list[str]:
    """Return the split of each kept entry: the user's, with a split that it lacks held out of its training images."""
    named = {entry.get("split") for entry in kept}
    free = [entry for entry in kept if entry.get("split", "train") == "train"]
    chosen = assign_splits(
        [entry["family"] for entry in free],
        [looks[entry["id"]] for entry in free],
        0.0 if "validation" in named else validation,
        0.0 if "test" in named else test,
        seed,
    )
    split_of = dict(zip((entry["id"] for entry in free), chosen, strict=True))
    return [split_of.get(entry["id"]) or entry["split"] for entry in kept]


def _check(row: Row, form: _Form) -> tuple[list[Image.Image], dict[str, Any]]:
    """Return a row's image in its shapes and its accounting fields; raise Rejected if the row cannot be used."""
    if row.rejected is not None:
        raise row.rejected
    data = row.read(MAX_BYTES)
    if row.text is None:
        raise Rejected("no_caption", "there is no .txt or .caption beside it, and no metadata file names it")
    text = clean_caption(row.text)
    # Hash the bytes that are decoded: the file could change between two reads.
    if row.sha256 is not None and row.sha256 != (digest := hashlib.sha256(data).hexdigest()):
        raise Rejected("hash_mismatch", f"SHA-256 {digest}, expected {row.sha256!r}")
    decoded = decode(data)
    shapes, bucket = form.shapes(decoded.image)
    found: dict[str, Any] = {"text": text, "family": row.family, "pixels": pixel_hash(shapes[0]), "mode": decoded.mode}
    if decoded.image.width != decoded.image.height:
        found["size"] = decoded.image.height, decoded.image.width
    if bucket is not None:
        found["bucket"] = bucket
    if decoded.animated:
        found["animated"] = True
    if others := [other for other in dict.fromkeys(map(clean_caption, row.other_texts)) if other != text]:
        found["other_texts"] = others
    if row.split is not None:
        found["split"] = row.split
    if row.repeats > 1:
        found["repeats"] = row.repeats
    if text != row.text:
        found["original_text"] = row.text
    if row.attributes is not None:
        found["attributes"] = [
            {"name": name, "words": words, "asked": name in row.asked} for name, words in row.attributes.items()
        ]
    return shapes, found


def _summary(entries: Sequence[dict[str, Any]], splits: dict[str, int], size: int, resize: Resize) -> dict[str, Any]:
    status = Counter(entry["status"] for entry in entries)
    kept = [entry for entry in entries if entry["status"] == "kept"]
    return {
        "rows": len(entries),
        "kept": status["kept"],
        "rejected": status["rejected"],
        "duplicates": status["duplicate"],
        "reasons": _counts(entry["reason"] for entry in entries if entry["status"] == "rejected"),
        "splits": splits,
        "modes": _counts(entry["mode"] for entry in kept),
        "animated": sum("animated" in entry for entry in kept),
        "cleaned_captions": sum("original_text" in entry for entry in kept),
        # An image with several captions, and a caption of several images: both are kept.
        "repeated_images": len(kept) - len({entry["pixels"] for entry in kept}),
        "repeated_captions": len(kept) - len({entry["text"] for entry in kept}),
    } | _shapes(kept, size, resize)


def _shapes(kept: Sequence[dict[str, Any]], size: int, resize: Resize) -> dict[str, Any]:
    """Return the images of each bucket and the fraction of the pixels that are cut off, if there are any."""
    found: dict[str, Any] = {}
    if buckets := _counts(named(entry["bucket"]) for entry in kept if "bucket" in entry):
        found["buckets"] = buckets
    other = [entry for entry in kept if "size" in entry]
    if resize == "crop" and other:
        cut = sum(cut_off(entry["size"], entry.get("bucket", (size, size))) for entry in other)
        found["cut_off"] = round(cut / len(kept), 4)
    return found


def _counts(values: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(values).items()))


def _nothing_kept(rows: Sequence[Row], entries: Sequence[dict[str, Any]]) -> str:
    """Return the error message if no row can be used: each reason with its count and one example."""
    lines = [f"none of the {len(rows)} rows can be used:"]
    reasons = _counts(entry["reason"] for entry in entries)
    for reason, count in reasons.items():
        index = next(index for index, entry in enumerate(entries) if entry["reason"] == reason)
        example = rows[index].file if rows[index].draw else str(rows[index].path)
        # !a, because a user's file name may contain terminal control sequences.
        lines.append(f"  {reason}: {count}, for example {example!a} ({entries[index]['detail']})")
    return "\n".join([*lines, "Correct these, or set prepare.source to figures in params.yaml."])


def _empty_split(counts: dict[str, int], validation: float, test: float) -> str:
    found = ", ".join(f"{count} {split}" for split, count in counts.items())
    return (
        f"{sum(counts.values())} kept rows split into {found}; each split needs at least one. "
        f"Add images (a family of fewer than {SMALL_FAMILY} is used for training only), "
        f"or raise prepare.validation ({validation}) or prepare.test ({test}) in params.yaml."
    )
