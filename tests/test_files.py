import errno
import os
import resource
import signal

import pytest
from faults import at_line, fill_disk, in_child, kill

from sage import files


def test_a_file_is_whole_or_as_before(tmp_path):
    path = tmp_path / "deep" / "a.txt"
    files.write_text(path, "first")
    with pytest.raises(RuntimeError, match="stop"), files.new_file(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError("stop")
    assert path.read_text() == "first"
    files.write_text(path, "second")
    assert path.read_text() == "second"
    assert [item.name for item in path.parent.iterdir()] == ["a.txt"]


def test_a_folder_is_whole_or_as_before(tmp_path):
    path = tmp_path / "model"
    with files.new_folder(path) as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "old").write_text("old")
    with pytest.raises(RuntimeError, match="stop"), files.new_folder(path) as temporary:
        (temporary / "new").write_text("half")
        raise RuntimeError("stop")
    assert (path / "sub" / "old").read_text() == "old"
    with files.new_folder(path) as temporary:
        (temporary / "new").write_text("new")
    assert [item.name for item in path.iterdir()] == ["new"]
    assert [item.name for item in tmp_path.iterdir()] == ["model"]


def test_what_killed_writers_left_is_removed_and_nothing_else(tmp_path):
    (tmp_path / ".a[1].txt.tmp-99").write_text("left")
    others = [".a1.txt.tmp-99", ".a[1].txt.tmp-b.txt.tmp-99"]  # of the files a1.txt and a[1].txt.tmp-b.txt
    for name in others:
        (tmp_path / name).write_text("another's")
    files.write_text(tmp_path / "a[1].txt", "x")
    (tmp_path / ".b.tmp-99").mkdir()
    (tmp_path / ".b.old-99").mkdir()
    with files.new_folder(tmp_path / "b"):
        pass
    assert sorted(item.name for item in tmp_path.iterdir()) == [*others, "a[1].txt", "b"]


def test_json_refuses_what_is_not_a_number(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        files.write_json(tmp_path / "a.json", {"value": float("nan")})
    assert not list(tmp_path.iterdir())


def test_digests_depend_on_names_and_contents_alone(tmp_path):
    def tree(name, contents):
        folder = tmp_path / name
        for path, text in contents:
            files.write_text(folder / path, text)
        return files.sha256_tree(folder)

    one = tree("one", [("a", "1"), ("b/c", "2")])
    assert one == tree("two", [("b/c", "2"), ("a", "1")])
    assert len({one, tree("three", [("a", "1"), ("c", "2")]), tree("four", [("a", "1"), ("b/c", "3")])}) == 3
    assert files.digest({"a": 1, "b": [2]}) == files.digest({"b": [2], "a": 1}) != files.digest({"a": 1, "b": [3]})
    assert files.sha256(tmp_path / "one" / "a") == "6b86b273ff34fce19d6b804eff5a3f5747ada4eaa22f1d49c01e52ddb7875b4b"


@pytest.mark.slow
@pytest.mark.parametrize("effect", [kill, fill_disk])
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_no_fault_at_any_line_leaves_half_a_result(kind, effect, tmp_path):
    path = tmp_path / "out"

    def write(text):
        if kind == "file":
            return files.write_text(path, text)
        with files.new_folder(path) as temporary:
            for name in "ab":
                (temporary / name).write_text(text)

    def read():
        return {item.read_text() for item in ([path] if kind == "file" else path.iterdir())}

    def write_with_fault(number):
        at_line(number, effect)
        write("new")

    write("old")
    number, ended = 0, 1
    while ended:
        number += 1
        ended = in_child(lambda: write_with_fault(number))  # noqa: B023
        # Between the two renames of a folder there is none of this name; half of one never.
        if kind == "file" or path.exists() or effect is fill_disk:
            assert read() in ({"old"}, {"new"}), number
        write("old")
        assert [item.name for item in tmp_path.iterdir()] == ["out"], number
    assert number > 25


@pytest.mark.slow
def test_a_full_disk_is_told_with_the_path_and_changes_nothing(tmp_path):
    path = tmp_path / "out"
    files.write_text(path, "old")

    def write_too_much():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            files.write_text(path, "x" * 100_000)
        except OSError as error:
            os._exit(7 if error.filename == str(path) and error.errno == errno.EFBIG else 1)

    assert in_child(write_too_much) == 7
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1
