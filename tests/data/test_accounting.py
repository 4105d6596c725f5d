"""The accounting of stage prepare, read back."""

import pytest

from sage.data.accounting import ACCOUNTING, read_accounting, write_accounting
from sage.errors import DataError

ENTRIES = [
    {"id": "1", "file": "a.png", "status": "kept", "split": "train", "bucket": [48, 80]},
    {"id": "2", "file": "b.png", "status": "kept", "split": "train", "bucket": [48, 80]},
    {"id": "3", "file": "c.png", "status": "kept", "split": "test", "bucket": [64, 64]},
    {"id": "4", "file": "", "status": "rejected", "reason": "no_caption", "detail": "there is none"},
    {"id": "5", "file": "d\ud800.png", "status": "rejected", "reason": "no_caption", "detail": "there is none"},
    {"id": "6", "file": "e.png", "status": "duplicate", "of": "1"},
]


def test_rows_are_counted_by_what_became_of_them(tmp_path):
    write_accounting(tmp_path, ENTRIES)
    found = read_accounting(tmp_path)
    assert (found.rows, found.kept, found.duplicates) == (6, 3, 1)
    assert found.rejected == {"no_caption": [("4", "there is none"), ("d\ud800.png", "there is none")]}
    assert found.buckets == {(48, 80): 2}  # sizes of training images only


@pytest.mark.parametrize("line", ["{", "3", '{"id": "7"}', '{"id": "7", "file": "", "status": "lost"}'])
def test_a_damaged_line_is_named(tmp_path, line):
    with pytest.raises(DataError, match=r"accounting.jsonl does not exist. Run `dvc repro prepare`"):
        read_accounting(tmp_path)
    write_accounting(tmp_path, ENTRIES)
    with (tmp_path / ACCOUNTING).open("a") as file:
        file.write(line + "\n")
    with pytest.raises(DataError, match=r"accounting.jsonl, line 7 is damaged. Run `dvc repro --force prepare`"):
        read_accounting(tmp_path)
