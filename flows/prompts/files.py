"""The one reader for lists of prompts: text, JSON lines and tables, for `sage generate`, `sage group` and shards.

Every row of a list becomes one item, in order: a prompt, or an error that says why the row is not a prompt. A template
becomes an item for each of its prompts. An exception is raised only if the list cannot be read at all.
"""

import itertools
import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import charset_normalizer
import typer

from sage.data.captions import clean_caption
from sage.data.rows import Rejected
from sage.data.tables import read_table, split_lines
from sage.data.templates import Syntax, check, template
from sage.errors import ConfigurationError, DataError

# Options of the commands that read lists of prompts.
Expand = Annotated[
    str | None,
    typer.Option(
        metavar="all|N",
        help="Prompts are templates, {red|blue} vase or a __colour__ vase: every combination, or N random ones of each "
        "template. They share steps within their template only.",
    ),
]
Wildcards = Annotated[
    Path | None, typer.Option(help="Folder of the files with the alternatives of __name__, name.txt; for --expand.")
]
Literal = Annotated[
    bool,
    typer.Option(
        "--literal",
        help="Draw {a|b}, (word:1.3), ((word)), BREAK, AND and <lora:...> as the text they are; else such prompts are "
        "errors.",
    ),
]

_MARKS = {  # byte order marks; UTF-32 before UTF-16, whose mark it begins with
    b"\xff\xfe\x00\x00": "utf-32",
    b"\x00\x00\xfe\xff": "utf-32",
    b"\xef\xbb\xbf": "utf-8-sig",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
}
_COLUMNS = ("prompt", "text")
_KEY = "share_key"
# Bytes that are not UTF-8, as Python's surrogateescape decodes them.
_ESCAPED = re.compile("[\udc80-\udcff]")
# How ISO-2022 changes its alphabet. All its bytes are ASCII, so its Japanese would be drawn as those letters.
_ISO_2022 = re.compile(r"\x1b[$(]")


@dataclass(frozen=True)
class Item:
    """One row of a list of prompts: its name (by default its number) and its prompt, or the error of a bad row.

    Rows share only with rows of the same `share_key`, their text in the column of that name (default: empty).
    """

    id: str
    prompt: str
    error: str | None = None
    share_key: str = ""


@dataclass(frozen=True)
class _Row:
    """A row as a reader found it, not yet checked: name and share key (if it has them) and prompt, or a problem."""

    id: object = None
    prompt: object = None
    share_key: object = None
    problem: str | None = None


def syntax(expand: str | None, wildcards: Path | None, literal: bool, seed: int) -> Syntax:
    """Return how prompts are written, from the options of a command; raise ConfigurationError if they are wrong."""
    if expand is None and wildcards is not None:
        raise ConfigurationError("--wildcards is the folder for --expand, which is missing; add --expand all")
    if wildcards is not None and not wildcards.is_dir():
        raise ConfigurationError(f"--wildcards {wildcards} is no folder; give the folder with the files of wildcards")
    if expand not in (None, "all") and not re.fullmatch("[0-9]{1,9}", str(expand)):
        raise ConfigurationError(f"--expand is {expand!r}; give all, or the number of prompts of each template")
    sample = None if expand in (None, "all") else int(str(expand))
    return Syntax(expand is not None, wildcards, sample, seed, literal)


def read_prompts(source: str, written: Syntax = Syntax()) -> list[Item]:  # noqa: B008 - frozen
    """Return the rows of a file, or of standard input ("-", one prompt per line), as items in order.

    `written` says how the prompts are written; by default what looks like a template or markup is an error. Blank lines
    and rows are skipped. Raises DataError if the file is missing, its suffix is unknown, its encoding contradicts its
    byte order mark, it looks like UTF-16 without a mark, a table has no column of prompts, or a name is unsafe as a
    file name or used twice.
    """
    path = Path(source)
    kinds = ", ".join(_READERS)
    if source != "-" and not path.is_file():
        raise DataError(f"{source} is no file; give a file of prompts ({kinds}), or - for standard input")
    kind = ".txt" if source == "-" else path.suffix.lower()
    if kind not in _READERS:
        raise DataError(f"{source} ends in {kind or 'nothing'}; prompts are read from {kinds} or -")
    data = sys.stdin.buffer.read() if source == "-" else path.read_bytes()
    text = _decoded(data, source)
    guess = _guess(data) if _ESCAPED.search(text) else ""
    rows = [_item(number, row, guess) for number, row in enumerate(_READERS[kind](text, source), start=1)]
    items = [item for row in rows for item in (_expanded(row, written) if row.error is None else [row])]
    names = sorted(item.id.lower() for item in items)
    if twice := next((a for a, b in itertools.pairwise(names) if a == b), None):
        raise DataError(f"two prompts are named {twice!r}; names become file names, so each must be different")
    return items


def negative(prompt: str, literal: bool) -> str:
    """Return a negative prompt as it is drawn, cleaned; `literal` says that templates and markup in it are text.

    Raises ConfigurationError for one that the commands refuse as a prompt, and for a template: only prompts are
    expanded.
    """
    if not prompt.strip():
        return ""
    try:
        text = clean_caption(prompt)
        if not literal and (found := template(text)):
            raise DataError(
                f"{found!r} is a template, and only prompts are expanded; write one text, or say that it is text "
                "(--literal)"
            )
        if not literal:
            check(text)
    except DataError as error:
        raise ConfigurationError(f"--negative-prompt: {error}") from error
    except Rejected as error:
        raise ConfigurationError(f"--negative-prompt: {error.reason}: {error.detail}") from error
    return text


def _item(number: int, row: _Row, guess: str) -> Item:
    id = f"{number:06d}" if row.id in (None, "") else str(row.id)
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}", id):
        raise DataError(f"prompt {number} is named {id!r}; names become files: use letters, digits, '.', '_', '-'")
    problem = row.problem
    if problem is None and isinstance(row.prompt, str) and (broken := _ESCAPED.search(row.prompt)):
        byte = ord(broken[0]) - 0xDC00
        problem = f"bad_text: byte 0x{byte:02X} is not UTF-8{guess}; save the list as UTF-8"
    if problem is None and isinstance(row.prompt, str) and _ISO_2022.search(row.prompt):
        problem = "bad_text: it has an escape sequence of ISO-2022; save the list as UTF-8"
    if problem is not None:
        return Item(id, "", problem)
    try:
        return Item(id, clean_caption(row.prompt), share_key="" if row.share_key is None else str(row.share_key))
    except Rejected as error:
        return Item(id, "", f"{error.reason}: {error.detail}")


def _expanded(item: Item, written: Syntax) -> Iterator[Item]:
    """Yield the items of a row's prompts; those of one template share among themselves only."""
    try:
        prompts = written.prompts(item.prompt)
    except DataError as error:
        yield replace(item, prompt="", error=f"bad_template: {error}")
        return
    key = item.share_key if len(prompts) == 1 else f"{item.share_key}\n{item.prompt}"
    for number, prompt in enumerate(prompts, start=1):
        id = item.id if len(prompts) == 1 else f"{item.id}-{number:0{len(str(len(prompts)))}d}"
        try:
            if not written.literal:
                check(prompt)
            yield Item(id, clean_caption(prompt), share_key=key)
        except DataError as error:
            yield Item(id, "", f"markup: {error}")
        except Rejected as error:
            yield Item(id, "", f"{error.reason}: {error.detail}")


def _decoded(data: bytes, source: str) -> str:
    """Return the text; a byte that is not UTF-8 becomes a surrogate, so that only its own prompt is an error."""
    encoding = next((name for mark, name in _MARKS.items() if data.startswith(mark)), None)
    # In UTF-16 and UTF-32 every line feed has a zero beside it, also in scripts whose letters have none.
    zeros = b"\n\0" in data or b"\0\n" in data or data[:1000].count(0) > len(data[:1000]) // 4
    if encoding is None and zeros:
        raise DataError(
            f"{source} holds zero bytes as UTF-16 does, but no byte order mark; save it as UTF-8, or with the mark"
        )
    try:
        return data.decode(encoding or "utf-8", "surrogateescape")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{source} begins with the byte order mark of {encoding}, but cannot be decoded: {error}; save it as UTF-8"
        ) from error


def _guess(data: bytes) -> str:
    """Return a phrase with the two most likely encodings; for short lists one guess is often wrong."""
    found = [match.encoding for match in charset_normalizer.from_bytes(data) if match.encoding != "utf_8"][:2]
    return f" (the list looks like {' or '.join(found)})" if found else ""


def _lines(text: str, source: str) -> Iterator[_Row]:
    return (_Row(prompt=line) for line in split_lines(text) if line.strip())


def _json_rows(text: str, source: str) -> Iterator[_Row]:
    if text.lstrip().startswith("["):
        try:
            return map(_json_row, json.loads(text, object_pairs_hook=_json_object))
        except (ValueError, RecursionError):
            pass  # lines of lists, each of which is a row that is no prompt
    return (_json_line(line) for line in split_lines(text) if line.strip())


def _json_line(line: str) -> _Row:
    try:
        return _json_row(json.loads(line, object_pairs_hook=_json_object))
    except (ValueError, RecursionError) as error:
        return _Row(problem=f"bad_row: not JSON: {error}")


def _json_object(pairs: list[tuple[str, object]]) -> dict[str, object] | _Row:
    """Return an object with its keys in lower case, or a problem if it says something twice that is read."""
    names = [key.strip().lower() for key, _ in pairs]
    if twice := next((name for name in ("id", _KEY, *_COLUMNS) if names.count(name) > 1), None):
        return _Row(problem=f"bad_row: two values for {twice}; leave one")
    return dict(zip(names, (value for _, value in pairs), strict=True))


def _json_row(value: object) -> _Row:
    if isinstance(value, _Row):
        return value
    if isinstance(value, str):
        return _Row(prompt=value)
    if not isinstance(value, dict):
        return _Row(problem=f"bad_row: {type(value).__name__} is neither a text nor an object with a prompt")
    return _Row(value.get("id"), value.get("prompt", value.get("text")), value.get(_KEY))


def _table(text: str, source: str) -> Iterator[_Row]:
    table = read_table(text, _COLUMNS)
    found = [name for name in _COLUMNS if name in table.columns]
    if table.problem or not found:
        raise DataError(
            f"{source}: the table has columns {table.header}, but none is named prompt or text; "
            f"give it a header{f' ({table.problem})' if table.problem else ''}"
        )
    if twice := next((name for name in (found[0], _KEY) if table.columns.count(name) > 1), None):
        raise DataError(f"{source}: {table.columns.count(twice)} columns are named {twice}; leave one")
    return (
        _Row(problem=f"bad_row: {record.problem}")
        if record.problem is not None
        else _Row(record.cells.get("id"), record.cells.get(found[0]), record.cells.get(_KEY))
        for record in table.records
    )


_READERS: dict[str, Callable[[str, str], Iterator[_Row]]] = {
    ".txt": _lines,
    ".jsonl": _json_rows,
    ".json": _json_rows,
    ".csv": _table,
    ".tsv": _table,
}
