"""Tables of text, as people and spreadsheets write them."""

from collections.abc import Iterator
from typing import Any

from sage.data.tables import _rows, read_table


def test_a_table_has_its_columns_in_lower_case_and_its_bad_rows_in_place() -> None:
    table = read_table('File_Name; Text\na.png;"a; b"\n;\nb.png;c;d\n"open\nc.png;e\n', {"text"})
    assert (table.header, table.columns) == (["File_Name", "Text"], ["file_name", "text"])
    cells, problems = zip(*((record.cells, record.problem) for record in table.records), strict=True)
    assert cells == ({"file_name": "a.png", "text": "a; b"}, {}, {}, {"file_name": "c.png", "text": "e"})
    assert [problem is None for problem in problems] == [True, False, False, True]


def test_bad_rows_cost_no_more_time_the_further_down_they_are(tmp_path):
    class Counted(list[str]):
        reads = 0

        def __getitem__(self, index: Any) -> Any:
            self.reads += 1
            return super().__getitem__(index)

        def __iter__(self) -> Iterator[str]:
            return (self[number] for number in range(len(self)))

    lines = Counted(f'"a" {number}\n' for number in range(1000))
    assert [problem is None for _, problem in _rows(lines, 0, ",")] == [False] * 1000
    assert lines.reads < 3 * 1000
