"""Stage prepare on real folders: every bad file of the table, the whole accounting, and what a user sees."""

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from collections import Counter, defaultdict, namedtuple
from contextlib import closing
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from image_files import REJECTED, drawing, encoded, rejected_file
from PIL import Image

from flows.stages.prepare import main
from flows.terminal import run
from sage.data import figures
from sage.data.accounting import ACCOUNTING
from sage.data.buckets import bucket_sizes, cut_off, named, nearest_bucket
from sage.data.dataset import SPLITS, SUMS, load_pixels, read_split
from sage.data.imagefolder import read_folder, read_kohya
from sage.data.preparation import disk_needed, prepare
from sage.data.rows import Row
from sage.data.shards import rgb
from sage.errors import DataError
from sage.files import sha256_tree

SETTINGS: dict[str, Any] = {"size": 16, "resize": "pad", "validation": 0.1, "test": 0.2, "seed": 0}


def noise(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8))


def put(folder: Path, name: str, data: bytes, caption: str | bytes | None) -> None:
    (folder / name).write_bytes(data)
    if caption is not None:
        text = caption.encode() if isinstance(caption, str) else caption
        (folder / name).with_suffix(".txt").write_bytes(text)


@pytest.fixture
def good(tmp_path: Path) -> Path:
    """Twenty good pictures."""
    folder = tmp_path / "raw"
    folder.mkdir()
    for place in range(20):
        put(folder, f"good-{place:02}.png", encoded(noise(place), "PNG"), f"noise number {place}")
    return folder


@pytest.fixture
def bad(good: Path) -> tuple[Path, dict[str, str]]:
    """The same with every bad file there is, and the reason that each must get."""
    secret = good.parent / "secret.png"
    secret.write_bytes(encoded(noise(99), "PNG"))
    expected = {}
    for place, (name, (_, reason)) in enumerate(REJECTED.items()):
        file = f"bad-{place:02}.png"
        put(good, file, rejected_file(name), "a bad picture")
        expected[file] = reason
    for place, (caption, reason) in enumerate(
        [(None, "no_caption"), ("", "no_caption"), (" \n", "no_caption"), ("a\0b", "bad_text"), (b"\xff", "bad_text")]
    ):
        name = f"caption-{place}.png"
        put(good, name, encoded(noise(50 + place), "PNG"), caption)
        expected[name] = reason
    (good / "link.png").symlink_to(secret)
    os.mkfifo(good / "pipe.png")
    put(good, "Case.png", encoded(noise(60), "PNG"), "one of two")
    put(good, "case.png", encoded(noise(61), "PNG"), "one of two")
    expected |= dict.fromkeys(["link.png", "pipe.png", "Case.png", "case.png"], "unsafe_path")
    lines: list[tuple[dict[str, Any], str]] = [
        ({"file_name": "../secret.png", "text": "out"}, "unsafe_path"),
        ({"file_name": str(secret), "text": "out"}, "unsafe_path"),
        ({"file_name": f"file://{secret}", "text": "out"}, "unsafe_path"),
        ({"file_name": "gone.png", "text": "gone"}, "missing_file"),
        ({"file_name": "wrong.jpg", "text": "not what was meant", "sha256": "0" * 64}, "hash_mismatch"),
        ({"file_name": "list.png", "text": ["a", 3]}, "no_caption"),
        ({"file_name": "nan.png", "text": float("nan")}, "no_caption"),
        ({"file_name": "half.png", "text": "half \ud83d"}, "bad_text"),
    ]
    put(good, "wrong.jpg", encoded(noise(70), "JPEG"), None)
    for place, name in enumerate(["list.png", "nan.png", "half.png"]):
        put(good, name, encoded(noise(71 + place), "PNG"), None)
    (good / "metadata.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line, _ in lines) + "{broken\n")
    expected |= {line["file_name"]: reason for line, reason in lines} | {"metadata.jsonl:9": "bad_row"}
    return good, expected


def accounting(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / ACCOUNTING).read_text().splitlines()]


def test_every_bad_file_gets_its_reason_and_the_good_ones_are_kept(
    bad: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    folder, expected = bad
    rows = read_folder(folder)
    out = tmp_path / "out"
    found = prepare(rows, out, **SETTINGS)
    entries = accounting(out)
    assert {entry["file"]: entry["reason"] for entry in entries if entry["status"] == "rejected"} == expected
    assert sorted(entry["file"] for entry in entries if entry["status"] == "kept") == [
        f"good-{place:02}.png" for place in range(20)
    ]
    assert len(expected) >= 50
    assert (found["rows"], found["kept"], found["rejected"], found["duplicates"]) == (len(rows), 20, len(expected), 0)
    assert len(entries) == found["rows"] == found["kept"] + found["rejected"] + found["duplicates"]
    assert found["reasons"] == dict(sorted(Counter(expected.values()).items()))
    assert found["splits"] == {"train": 14, "validation": 2, "test": 4}
    # The same input gives the same bytes, wherever they are written.
    again = prepare(read_folder(folder), tmp_path / "again", **SETTINGS)
    assert again == found
    assert sha256_tree(out) == sha256_tree(tmp_path / "again") == found["digest"]


def test_nothing_outside_the_folder_and_no_link_or_pipe_is_opened(
    bad: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    folder, _ = bad
    opened: list[str] = []
    watching = True

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if watching and event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
            opened.append(os.fsdecode(arguments[0]))

    sys.addaudithook(watch)  # there is no way to take it off again, so it is told to look away
    try:
        prepare(read_folder(folder), tmp_path / "out", **SETTINGS)
    finally:
        watching = False
    below = [path for path in opened if path.startswith(f"{folder}/")]
    assert f"{folder}/good-00.png" in below
    assert not [path for path in opened if "secret" in path or path.startswith("/etc")]
    assert not {f"{folder}/link.png", f"{folder}/pipe.png", f"{folder}/Case.png"} & set(below)


def test_what_is_kept_is_written_in_shards_and_the_sums_of_all_files_hold(good: Path, tmp_path: Path) -> None:
    prepare(read_folder(good), tmp_path / "out", **SETTINGS)
    ids = []
    for split in SPLITS:
        examples = read_split(tmp_path / "out", split)
        assert [path.name for path in (tmp_path / "out" / split).iterdir()] == ["00000.parquet"]
        for example, pixels in zip(examples, load_pixels(examples), strict=True):
            assert np.array_equal(pixels, np.asarray(noise(int(example.text.split()[-1]))))
        ids += [example.id for example in examples]
    assert len(ids) == len(set(ids)) == 20
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*SPLITS, ACCOUNTING, SUMS}
    assert len((tmp_path / "out" / SUMS).read_text().splitlines()) == len(SPLITS) + 1
    subprocess.run(["sha256sum", "--check", "--quiet", "--strict", SUMS], cwd=tmp_path / "out", check=True)


def test_a_duplicate_is_dropped_and_a_repeated_picture_stays_in_one_split(tmp_path: Path) -> None:
    folder = tmp_path / "raw"
    folder.mkdir()
    for place in range(40):
        pixels = noise(place % 20)
        put(folder, f"{place:02}.png", encoded(pixels, "PNG" if place < 20 else "BMP"), f"caption {place}")
    put(folder, "copy.png", encoded(noise(3), "TIFF"), "  caption\t3 ")  # other bytes, other spaces, the same example
    put(folder, "same-caption.png", encoded(noise(33), "PNG"), "caption 3")
    found = prepare(read_folder(folder), tmp_path / "out", **SETTINGS)
    assert (found["kept"], found["duplicates"], found["rejected"]) == (41, 1, 0)
    assert (found["repeated_images"], found["repeated_captions"], found["cleaned_captions"]) == (20, 1, 0)
    entries = {entry["file"]: entry for entry in accounting(tmp_path / "out")}
    assert entries["copy.png"] == {
        "id": entries["copy.png"]["id"],
        "file": "copy.png",
        "status": "duplicate",
        "of": entries["03.png"]["id"],
    }
    for place in range(20):
        assert entries[f"{place:02}.png"]["split"] == entries[f"{place + 20}.png"]["split"]


def put_splits(folder: Path, **places: range) -> Path:
    """Write images into a folder for each split; equal places are equal images, with a caption for each folder."""
    for split, numbers in places.items():
        (folder / split).mkdir(parents=True)
        for place in numbers:
            put(folder / split, f"{place:02}.png", encoded(noise(place), "PNG"), f"number {place} of {split}")
    return folder


def found_splits(out: Path) -> dict[str, set[str]]:
    """Return the splits that the rows of each folder went to."""
    found: dict[str, set[str]] = defaultdict(set)
    for entry in accounting(out):
        found[entry["file"].partition("/")[0]].add(entry.get("split", entry.get("reason", "duplicate")))
    return found


def test_a_users_split_is_kept_whole(tmp_path: Path) -> None:
    folder = put_splits(tmp_path / "raw", train=range(12), Val=range(12, 15), test=range(15, 20))
    found = prepare(read_folder(folder), tmp_path / "out", **SETTINGS)
    assert found_splits(tmp_path / "out") == {"train": {"train"}, "Val": {"validation"}, "test": {"test"}}
    assert found["splits"] == {"train": 12, "validation": 3, "test": 5}


@pytest.mark.parametrize(("held_out", "missing"), [("test", "validation"), ("validation", "test")])
def test_a_split_that_the_user_has_not_is_held_out_of_train(tmp_path: Path, held_out: str, missing: str) -> None:
    folder = put_splits(tmp_path / "raw", train=range(20), **{held_out: range(20, 25)})
    prepare(read_folder(folder), tmp_path / "out", **SETTINGS)
    assert found_splits(tmp_path / "out") == {"train": {"train", missing}, held_out: {held_out}}


def test_an_image_in_two_of_the_users_splits_stays_in_the_held_out_one(tmp_path: Path) -> None:
    folder = put_splits(tmp_path / "raw", train=range(12), validation=range(10, 16), test=range(15, 20))
    for split in ("train", "validation"):
        put(folder / split, "same.png", encoded(noise(99), "PNG"), "the same caption, too")
    found = prepare(read_folder(folder), tmp_path / "out", **SETTINGS)
    assert (found["splits"], found["reasons"]) == ({"train": 10, "validation": 6, "test": 5}, {"split_overlap": 3})
    status = {entry["file"]: entry["status"] for entry in accounting(tmp_path / "out")}
    rejected = {"train/10.png", "train/11.png", "validation/15.png"}
    assert {file for file, found in status.items() if found == "rejected"} == rejected
    assert {file for file, found in status.items() if found == "duplicate"} == {"train/same.png"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*SPLITS, ACCOUNTING, SUMS}


@pytest.mark.parametrize("folders", [{"train": 20}, {"train": 10, "cars": 10}, {"trains": 10, "tests": 10}])
def test_a_folder_that_is_no_split_is_one_like_others(tmp_path: Path, folders: dict[str, int]) -> None:
    starts = dict(zip(folders, (0, 20), strict=False))
    places = {name: range(starts[name], starts[name] + count) for name, count in folders.items()}
    assert {row.split for row in read_folder(put_splits(tmp_path / "raw", **places))} == {None}


@pytest.mark.parametrize(
    ("folders", "says"),
    [
        (("train", "test", "cars"), r"holds test, train, but 4 images lie outside of them, first 'cars/00.png'"),
        (("test", "validation"), r"holds test, validation, but there is no train"),
        (("test", "cars"), r"holds test, but 4 images lie outside"),
    ],
)
def test_half_a_split_is_refused(tmp_path: Path, folders: tuple[str, ...], says: str) -> None:
    folder = put_splits(tmp_path / "raw", **dict.fromkeys(folders, range(4)))
    with pytest.raises(DataError, match=says):
        read_folder(folder)


def test_what_was_changed_is_counted_and_its_original_kept(good: Path, tmp_path: Path) -> None:
    put(good, "bidi.png", encoded(Image.new("CMYK", (16, 16)), "TIFF"), "\ufeffcafe\u0301 \u202ereversed\u202c")
    frames = [Image.new("L", (16, 16), 200), Image.new("L", (16, 16))]
    put(good, "moving.png", encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]), "moving")
    found = prepare(read_folder(good), tmp_path / "out", **SETTINGS)
    assert (found["cleaned_captions"], found["animated"]) == (1, 1)
    assert found["modes"] == {"CMYK": 1, "P": 1, "RGB": 20}
    entries = {entry["file"]: entry for entry in accounting(tmp_path / "out")}
    assert entries["bidi.png"]["text"] == "caf\u00e9 reversed"
    assert entries["bidi.png"]["original_text"] == "cafe\u0301 \u202ereversed\u202c"
    assert "original_text" not in entries["moving.png"]


def test_a_right_hash_is_kept_and_garbage_inside_a_picture_is_seen_by_it(good: Path, tmp_path: Path) -> None:
    whole = encoded(noise(1), "JPEG")
    # Inside the pixels: Pillow decodes it to something else without a word.
    spoilt = whole[:-40] + bytes(byte ^ 1 for byte in whole[-40:-38]) + whole[-38:]
    put(good, "right.jpg", whole, None)
    put(good, "spoilt.jpg", spoilt, None)
    put(good, "unknown.jpg", spoilt, "nobody can know")
    lines = [
        {"file_name": name, "text": name, "sha256": sha256(whole).hexdigest()} for name in ("right.jpg", "spoilt.jpg")
    ]
    (good / "metadata.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    prepare(read_folder(good), tmp_path / "out", **SETTINGS)
    entries = {entry["file"]: entry for entry in accounting(tmp_path / "out")}
    assert entries["right.jpg"]["status"] == entries["unknown.jpg"]["status"] == "kept"
    assert entries["spoilt.jpg"]["reason"] == "hash_mismatch"


def put_shapes(folder: Path) -> dict[str, tuple[int, int]]:
    """Write pictures of four shapes, ten of each; return the height and width of each file."""
    folder.mkdir()
    shapes = {}
    for place in range(40):
        height, width = ((30, 30), (30, 40), (60, 40), (20, 90))[place % 4]
        pixels = np.random.default_rng(place).integers(0, 250, (height, width, 3), dtype=np.uint8)
        put(folder, f"{place:02}.png", encoded(Image.fromarray(pixels), "PNG"), f"caption {place}")
        shapes[f"{place:02}.png"] = height, width
    return shapes


def test_training_images_keep_their_shape_in_buckets_and_held_out_ones_are_square(tmp_path: Path) -> None:
    shapes, buckets = put_shapes(tmp_path / "raw"), bucket_sizes(32, 8, 2.0)
    form = {"size": 32, "resize": "crop", "buckets": buckets}
    found = prepare(read_folder(tmp_path / "raw"), tmp_path / "out", **SETTINGS | form)
    entries = [entry for entry in accounting(tmp_path / "out") if entry["status"] == "kept"]
    wanted = {entry["id"]: nearest_bucket(buckets, shapes[entry["file"]]) for entry in entries}
    assert set(wanted.values()) == {(32, 32), (24, 40), (40, 24)}
    for split in SPLITS:
        examples = read_split(tmp_path / "out", split)
        for example in examples:
            size = wanted[example.id] if split == "train" else (32, 32)
            assert rgb(example.image).size == size[::-1]
            assert example.image.bucket == (size if split == "train" else None)
        sizes = [example.image.bucket for example in examples if split == "train"]
        assert sizes == sorted(sizes)
    train = [wanted[entry["id"]] for entry in entries if entry["split"] == "train"]
    assert found["buckets"] == {named(size): train.count(size) for size in sorted(set(train), key=named)}
    cuts = [cut_off(shapes[e["file"]], tuple(e.get("bucket", (32, 32)))) for e in entries]
    assert found["cut_off"] == pytest.approx(np.mean(cuts), abs=1e-4)
    again = prepare(read_folder(tmp_path / "raw"), tmp_path / "again", **SETTINGS | form)
    assert again == found


def test_buckets_change_neither_the_splits_nor_the_held_out_images(tmp_path: Path) -> None:
    put_shapes(tmp_path / "raw")
    out = {}
    for name, buckets in (("square", []), ("buckets", bucket_sizes(32, 8, 2.0))):
        form = {"size": 32, "resize": "crop", "buckets": buckets}
        prepare(read_folder(tmp_path / "raw"), tmp_path / name, **SETTINGS | form)
        out[name] = {split: read_split(tmp_path / name, split) for split in SPLITS}
    for split in SPLITS:
        square, own = ({example.id: example.image.read() for example in found[split]} for found in out.values())
        assert square.keys() == own.keys()
        assert split == "train" or square == own


def test_cropped_pictures_have_no_bars_and_padded_ones_keep_every_pixel(tmp_path: Path) -> None:
    put_shapes(tmp_path / "raw")
    for resize, white in (("crop", 0), ("pad", 30)):
        found = prepare(read_folder(tmp_path / "raw"), tmp_path / resize, **SETTINGS | {"size": 32, "resize": resize})
        assert ("cut_off" in found) == (resize == "crop")
        pixels = [np.asarray(rgb(one.image)) for split in SPLITS for one in read_split(tmp_path / resize, split)]
        assert sum((image[0] == 255).all() or (image[:, 0] == 255).all() for image in pixels) == white


def test_square_pictures_are_prepared_to_the_same_bytes_whatever_is_done_with_others(
    good: Path, tmp_path: Path
) -> None:
    digests = {
        prepare(read_folder(good), tmp_path / resize, **SETTINGS | {"resize": resize})["digest"]
        for resize in ("crop", "pad")
    }
    assert len(digests) == 1


def test_families_of_a_user_hold_out_some_and_never_all(tmp_path: Path) -> None:
    folder = tmp_path / "raw"
    folder.mkdir()
    lines = []
    for place in range(20):
        put(folder, f"{place}.png", encoded(noise(place), "PNG"), None)
        lines.append({"file_name": f"{place}.png", "text": f"t {place}", "family": "large" if place < 17 else "small"})
    (folder / "metadata.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    prepare(read_folder(folder), tmp_path / "out", **SETTINGS)
    splits = {split: Counter(example.family for example in read_split(tmp_path / "out", split)) for split in SPLITS}
    assert splits == {"train": {"large": 12, "small": 3}, "validation": {"large": 2}, "test": {"large": 3}}


def test_without_one_usable_row_the_reasons_are_named_and_nothing_is_written(tmp_path: Path) -> None:
    folder = tmp_path / "raw"
    folder.mkdir()
    put(folder, "a.png", b"", "a caption")
    put(folder, "b.png", encoded(drawing(), "PNG"), None)
    put(folder, "c.png", encoded(drawing(), "PNG"), None)
    with pytest.raises(DataError) as error:
        prepare(read_folder(folder), tmp_path / "out", **SETTINGS)
    message = str(error.value)
    assert "none of the 3 rows" in message
    assert "decode_error: 1" in message
    assert "no_caption: 2, for example" in message
    assert str(folder / "b.png") in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["raw"]


@pytest.mark.parametrize("n", [1, 3, 4])
def test_a_set_too_small_to_split_says_how_small(tmp_path: Path, n: int) -> None:
    folder = tmp_path / "raw"
    folder.mkdir()
    for place in range(n):
        put(folder, f"{place}.png", encoded(noise(place), "PNG"), "noise")
    with pytest.raises(DataError, match=rf"{n} kept rows split into {n - (n > 3)} train, 0 validation"):
        prepare(read_folder(folder), tmp_path / "out", **SETTINGS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["raw"]


def test_what_was_there_stays_until_the_new_folder_is_whole(good: Path, tmp_path: Path) -> None:
    before = prepare(read_folder(good), tmp_path / "out", **SETTINGS)

    def interrupt(n: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(read_folder(good), tmp_path / "out", **SETTINGS | {"seed": 1}, advance=interrupt)
    assert sha256_tree(tmp_path / "out") == before["digest"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "raw"]


def test_a_trusted_file_may_be_a_link(tmp_path: Path) -> None:
    # A row of a trusted file, as of an installed package, may be a link: package managers make them.
    (tmp_path / "real.png").write_bytes(encoded(drawing(), "PNG"))
    (tmp_path / "link.png").symlink_to("real.png")
    assert Row("a", tmp_path / "link.png", "t").read(10_000) == (tmp_path / "real.png").read_bytes()


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An own folder with this project's configuration, told to read a user's pictures."""
    params = yaml.safe_load((Path(__file__).parents[2] / "params.yaml").read_text())
    params["prepare"] |= {"source": "folder", "image_size": 16}
    params["evaluate"] |= {"alignment": "clip", "references": None}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SAGE_TRACKING_URI", "off")
    return tmp_path


def stage() -> None:
    main(raw=Path("raw"), out=Path("out"), metrics=Path("metrics/prepare.json"))


def test_the_stage_writes_data_and_figures_and_prints_the_accounting(
    project: Path, bad: tuple[Path, dict[str, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    stage()
    found = json.loads((project / "metrics" / "prepare.json").read_text())
    assert (found["source"], found["kept"]) == ("folder", 20)
    assert found["digest"] == sha256_tree(project / "out")
    printed = capsys.readouterr()
    table = {
        cells[0].strip(): cells[1].strip()
        for line in printed.out.splitlines()
        if len(cells := line.strip("│┃").split("│")) == 2
    }
    assert table["rejected: decode_error"] == str(found["reasons"]["decode_error"])
    assert sum(int(count) for name, count in table.items() if name != "input rows") == int(table["input rows"])
    assert int(table["input rows"]) == found["rows"]
    assert f"prepare: {found['rows']}/{found['rows']}" in printed.err


def test_a_set_that_the_disk_does_not_hold_is_refused_before_it_is_read(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_shapes(project / "raw")
    params = yaml.safe_load((project / "params.yaml").read_text())
    params["prepare"] |= {"image_size": 32, "buckets": {"step": 8, "max_aspect": 2.0}}
    (project / "params.yaml").write_text(yaml.safe_dump(params))
    rows = read_folder(project / "raw")
    needed = disk_needed(rows, size=32, resize="crop", buckets=bucket_sizes(32, 8, 2.0))
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, needed - 1))
    with pytest.raises(DataError, match=r"preparing 40 images takes about .* GB, but .* has .* GB free; make room"):
        stage()
    assert not (project / "out").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, needed))
    stage()
    # Twice the shards, of incompressible pictures, plus the held-out shape of those that have another bucket.
    shards = sum(path.stat().st_size for path in (project / "out").rglob("*.parquet"))
    assert 1.5 * shards < needed < 5 * shards
    assert json.loads((project / "metrics/prepare.json").read_text())["buckets"].keys() == {"32x32", "24x40", "40x24"}


@pytest.mark.slow
def test_the_stage_records_what_it_did(project: Path, good: Path) -> None:
    # A process of its own: MLflow's imports warn, and here a warning is an error.
    command = [
        sys.executable,
        "-m",
        "flows.stages.prepare",
        "--raw",
        "raw",
        "--out",
        "out",
        "--metrics",
        "prepare.json",
    ]
    environment = os.environ | {"SAGE_TRACKING_URI": f"sqlite:///{project / 'runs.db'}"}
    subprocess.run(command, check=True, env=environment, capture_output=True)
    found = json.loads((project / "prepare.json").read_text())
    with closing(sqlite3.connect(project / "runs.db")) as runs:
        ((run, result),) = runs.execute("SELECT run_uuid, value FROM tags WHERE key = 'sage.result_sha256'")
        assert result == sha256((project / "prepare.json").read_bytes()).hexdigest()

        def recorded(table: str) -> dict[str, Any]:
            return dict(runs.execute(f"SELECT key, value FROM {table} WHERE run_uuid = ?", [run]))

        assert recorded("params")["image_size"] == "16"
        assert (recorded("metrics")["kept"], recorded("metrics")["splits.test"]) == (20, 4)
        ((digest,),) = runs.execute("SELECT digest FROM datasets")
    assert found["digest"].startswith(digest)
    (sheet,) = (path for path in project.glob(f"mlartifacts/**/{run}/**/training_samples*.png"))
    with Image.open(sheet) as image:
        assert image.size == (8 * 16, 2 * 16)  # 14 training pictures in rows of 8


@pytest.mark.parametrize(
    ("prepare_folder", "message"),
    [
        (lambda folder: folder.rmdir(), "raw is no folder"),
        (lambda folder: None, "raw holds no images"),
        (lambda folder: put(folder, "a.png", b"", "a"), "none of the 1 rows can be used"),
        (lambda folder: put(folder, "a.png", encoded(drawing(), "PNG"), "a"), "1 kept rows split into 1 train"),
    ],
)
def test_a_set_that_cannot_be_used_ends_the_stage_with_one_message(
    project: Path,
    prepare_folder: Any,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (project / "raw").mkdir()
    prepare_folder(project / "raw")
    monkeypatch.setattr(sys, "argv", ["prepare", "--raw", "raw", "--out", "out", "--metrics", "metrics/prepare.json"])
    with pytest.raises(SystemExit) as stopped:
        run(main)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert f"error: {message}" in error
    assert "Traceback" not in error
    assert not (project / "out").exists()
    assert not (project / "metrics").exists()


def test_further_captions_go_along(tmp_path: Path) -> None:
    rows = figures.rows(["moods"], {"train": 12, "validation": 2, "test": 2}, size=16, seed=0, held_out=0.1)
    prepare(rows, tmp_path / "out", **SETTINGS)
    texts = {row.id: (row.text, *row.other_texts) for row in rows}
    assert any(row.other_texts for row in rows)
    for split in SPLITS:
        assert all(example.texts == texts[example.id] for example in read_split(tmp_path / "out", split))


def test_repeats_count_in_training_by_their_ratio_and_name_what_has_no_caption(tmp_path: Path) -> None:
    for name, places in {"20_a_cat": range(12), "30_dog": range(12, 20)}.items():
        (tmp_path / "raw" / name).mkdir(parents=True)
        for place in places:
            put(tmp_path / "raw" / name, f"{place}.png", encoded(noise(place), "PNG"), f"no {place}" if place else None)
    rows = read_kohya(tmp_path / "raw")
    assert {row.text for row in rows} == {"a cat", *(f"no {place}" for place in range(1, 20))}
    found = prepare(rows, tmp_path / "out", **SETTINGS)
    assert (found["kept"], found["splits"]) == (20, {"train": 14, "validation": 2, "test": 4})
    examples = {split: read_split(tmp_path / "out", split) for split in SPLITS}
    for split, read in examples.items():
        for text, count in Counter(example.text for example in read).items():
            place = 0 if text == "a cat" else int(text.split()[1])
            assert count == (1 if split != "train" else 2 if place < 12 else 3)
        assert len({example.id for example in read}) == len(read)
    put(tmp_path / "raw", "outside.png", encoded(noise(50), "PNG"), "outside")
    with pytest.raises(DataError, match=r"1 images, first 'outside.png', lie in no folder with repeats"):
        read_kohya(tmp_path / "raw")
