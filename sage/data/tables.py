"""Tables of text: comma, semicolon or tab between the cells, a header, and bad rows that do not spoil the others."""

import csv
import io
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Record:
    """One row of a table: its cells by their column in lower case, or the problem of a bad row."""

    cells: dict[str, str]
    problem: str | None = None


@dataclass(frozen=True)
class Table:
    """The names of the columns as written and in lower case, and the rows that are not empty, to be read once."""

    header: list[str]
    columns: list[str]
    records: Iterator[Record]
    problem: str | None = None


def split_lines(text: str) -> list[str]:
    """Return the lines with their ends: LF, CR LF or CR. str.splitlines would also split at a form feed or U+2028."""
    return list(io.StringIO(text, newline=""))


def read_table(text: str, wanted: Collection[str]) -> Table:
    """Return a table; if the header does not decide its separator, one that gives a column named in `wanted` is taken.

    The header may follow a line `sep=;`, as Excel writes it. `problem` is set if the header is no row of a table.
    """
    lines = split_lines(text)
    first = next((number for number, line in enumerate(lines) if line.strip()), 0)
    declared = re.fullmatch(r"sep=(.)\s*", lines[first] if lines else "")
    start = first + 1 if declared else first
    header_line = lines[start] if start < len(lines) else ""
    # The most frequent one, unless only another one makes a wanted column.
    delimiters = declared[1] if declared else sorted(",;\t", key=header_line.count, reverse=True)
    firsts = {delimiter: next(_rows(lines, start, delimiter), ([], None))[0] for delimiter in delimiters}
    named = (delimiter for delimiter, cells in firsts.items() if set(wanted) & set(_names(cells)))
    rows = _rows(lines, start, next(named, delimiters[0]))
    header, problem = next(rows, ([], None))
    columns = _names(header)
    return Table(header, columns, (_record(columns, cells, problem) for cells, problem in rows), problem)


def _names(cells: list[str]) -> list[str]:
    return [cell.strip().lower() for cell in cells]


def _record(columns: list[str], cells: list[str], problem: str | None) -> Record:
    if problem is None and any(cell.strip() for cell in cells[len(columns) :]):
        named = "1 column" if len(columns) == 1 else f"{len(columns)} columns"
        problem = f"{len(cells)} cells, but the table has {named}; put a text with separators in quotes"
    return Record(dict(zip(columns, cells, strict=False)) if problem is None else {}, problem)


def _rows(lines: list[str], start: int, delimiter: str) -> Iterator[tuple[list[str], str | None]]:
    """Yield cells and None for each row that is not empty, or no cells and the problem of a bad row.

    After a problem, such as a quote that is never closed, reading continues after the first line of the bad row.
    """
    while start < len(lines):
        # By number: to skip the lines before would take longer from fault to fault.
        rest = (lines[number] for number in range(start, len(lines)))
        reader = csv.reader(rest, delimiter=delimiter, skipinitialspace=delimiter != "\t", strict=True)
        begin = 0
        try:
            for cells in reader:
                begin = reader.line_num
                if any(cell.strip() for cell in cells):
                    yield cells, None
            return
        except csv.Error as error:
            yield [], f"{error} (a quote begins a cell and must end it)" if "limit" not in str(error) else str(error)
            start += begin + 1
