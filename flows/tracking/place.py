"""Where the project's own MLflow database and its artifacts are: mlflow.db and, beside it, mlartifacts.

MLflow records where artifacts are as absolute paths. So when a project was moved, renamed or copied, the records are
changed to the folder beside the database before they are used.
"""

import logging
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

log = logging.getLogger(__name__)

EXPERIMENT = "sage"
_ARTIFACTS = "mlartifacts"
# The columns in which MLflow keeps addresses of artifacts.
_ADDRESSES = {
    "experiments": ("artifact_location",),
    "runs": ("artifact_uri",),
    "logged_models": ("artifact_location",),
    "model_versions": ("source", "storage_location"),
}


def database() -> str:
    """Return the address of the database in the working directory."""
    # As an address that SQLite itself decodes: SQLAlchemy 2.0 takes a path as it stands, and a ? in it for a query. Not
    # sqlite:///, because MLflow makes the folder that it reads there.
    return f"sqlite+pysqlite:///file:{quote(str(Path.cwd() / 'mlflow.db'))}?uri=true"


def artifacts(uri: str) -> Path | None:
    """Return the folder of the artifacts of a database; None for a server, which chooses its own."""
    file = _file(uri)
    return None if file is None else file.parent / _ARTIFACTS


def missing(uri: str) -> Path | None:
    """Return the file of an SQLite database that does not exist yet; opening it would make it."""
    file = _file(uri)
    return file if file is not None and not file.exists() else None


def follow(uri: str) -> None:
    """Change the addresses in a database that is no longer where they say, if its artifacts are beside it, or lost."""
    file, home = _file(uri), artifacts(uri)
    if file is None or home is None or not file.exists():
        return
    with closing(sqlite3.connect(file, timeout=60, isolation_level=None)) as records:
        found = _location(records)
        if found is None or found == home or (found.exists() and not home.exists()):
            return
        log.warning("%s has moved here from %s; the records of its runs and versions follow", home, found)
        records.execute("BEGIN IMMEDIATE")
        for table, column, old, new in _changes(found.parent, home.parent):
            records.execute(
                f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE substr({column}, 1, ?) = ?",  # noqa: S608
                (new, len(old) + 1, len(old), old),
            )
        records.execute("COMMIT")


def _file(uri: str) -> Path | None:
    """Return the file of an SQLite address, or None."""
    parts = urlsplit(uri)
    if parts.scheme.partition("+")[0] != "sqlite" or parts.path in ("", "/"):
        return None
    path = parts.path[1:]
    return Path(unquote(path.removeprefix("file:")) if path.startswith("file:") else path).resolve()


def _location(records: sqlite3.Connection) -> Path | None:
    """Return the folder `mlartifacts` that the records name, or None if they name another or there are none."""
    try:
        row = records.execute("SELECT artifact_location FROM experiments WHERE name = ?", [EXPERIMENT]).fetchone()
    except sqlite3.OperationalError:
        return None  # MLflow has not made its tables yet
    parts = urlsplit(row[0]) if row else None
    if parts is None or parts.scheme not in ("", "file"):
        return None
    place = Path(unquote(parts.path))
    # A server records a folder below it.
    return next((folder for folder in (place, *place.parents) if folder.name == _ARTIFACTS), None)


def _changes(old: Path, new: Path) -> Iterator[tuple[str, str, str, str]]:
    """Yield table, column, and the beginnings of addresses below the old and the new folder, as address and as path."""
    for table, columns in _ADDRESSES.items():
        for column in columns:
            yield table, column, f"{old.as_uri()}/", f"{new.as_uri()}/"
            yield table, column, f"{old}/", f"{new}/"
