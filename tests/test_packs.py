"""Packs of images on disk: kept whole, or drawn again."""

import json

from PIL import Image

from flows import packs


def finished(folder):
    packs.begin(folder)
    for seed in (0, 3):
        packs.add(folder, seed, "p1", Image.new("RGB", (4, 4), (seed, 0, 0)))
    return packs.end(folder, 1.5, {"p1": 7})


def test_a_finished_pack_is_kept_as_it_was_written(tmp_path):
    written = finished(tmp_path / "pack")
    assert packs.kept(tmp_path / "pack") == written
    assert written.sha256.keys() == {"seed-0/p1.png", "seed-3/p1.png"}
    assert (written.seconds, written.unread) == (1.5, {"p1": 7})
    assert [name for name, _ in packs.images(tmp_path / "pack")] == ["seed-0/p1.png", "seed-3/p1.png"]


def test_an_unfinished_pack_is_not_kept_and_begins_anew(tmp_path):
    assert packs.kept(tmp_path / "none") is None
    packs.begin(tmp_path / "pack")
    packs.add(tmp_path / "pack", 0, "p1", Image.new("RGB", (4, 4)))
    assert packs.kept(tmp_path / "pack") is None
    packs.begin(tmp_path / "pack")
    assert list(packs.images(tmp_path / "pack")) == []


def test_a_damaged_pack_is_named_and_not_kept(tmp_path, caplog):
    record = tmp_path / "pack" / packs.PACK

    def missing():
        (tmp_path / "pack/seed-3/p1.png").unlink()

    def altered():
        path = tmp_path / "pack/seed-0/p1.png"
        path.write_bytes(path.read_bytes()[:-1] + b"x")

    def no_json():
        record.write_text("{")

    def other_json():
        record.write_text(json.dumps([1]))

    def lacks_a_field():
        record.write_text(json.dumps({"sha256": {}}))

    for damage, named in (
        (missing, "seed-3/p1.png"),
        (altered, "seed-0/p1.png"),
        *((f, packs.PACK) for f in (no_json, other_json, lacks_a_field)),
    ):
        finished(tmp_path / "pack")
        damage()
        caplog.clear()
        assert packs.kept(tmp_path / "pack") is None
        assert f"is damaged ({named}), so it is drawn again" in caplog.text
