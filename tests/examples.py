"""The examples that the pages show: blocks of Python, and commands of the shell."""

import itertools
import re
import shlex
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("data/raw/*.md"), *ROOT.glob("models/*/*.md")])
_FENCED = re.compile(r"^```.*?^```", flags=re.S | re.M)
_PROGRAM = r"(?:(?:sage|dvc|prefect|mlflow|python -m|accelerate launch) |scripts/)"


def python(page: str) -> list[str]:
    """Return the blocks of Python of a page, in order."""
    return re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), flags=re.S | re.M)


def ran(code: str, names: dict[str, Any], **stand_ins: tuple[str, str]) -> dict[str, Any]:
    """Run a block with these names and return them; each of `stand_ins` is what the block says, and what runs instead.

    The keywords of `stand_ins` say what is left out.
    """
    for left_out, (said, instead) in stand_ins.items():
        assert code.count(said) == 1, f"the {left_out} of the example, {said}, is not in it: {code}"
        code = code.replace(said, instead)
    exec(compile(code, "<example>", "exec"), names)
    return names


def commands(page: Path) -> set[str]:
    """Return the commands of this project's programs that a page shows, without the words that explain them."""
    text = _FENCED.sub("", page.read_text(encoding="utf-8"))
    shown = re.findall(rf"^    ({_PROGRAM}.*)$", text, flags=re.M) + re.findall(rf"`({_PROGRAM}[^`]*)`", text)
    return {re.split(r" #|  |\\$", line)[0].strip() for line in shown}


def session(page: str) -> list[str]:
    """Return the lines of the shell that a page shows in its indented blocks, in order; a line that goes on is one."""
    text = _FENCED.sub("", (ROOT / page).read_text(encoding="utf-8"))
    lines = re.findall(r"^    (\S.*?(?:\\\n.*)*)$", text, flags=re.M)
    return [re.sub(r"\s*\\\n\s*", " ", line) for line in lines]


def parsed(command: str) -> tuple[tuple[str, ...], list[str]]:
    """Return the program of a command with its subcommands, and the options that it is given."""
    words = shlex.split(command)
    program = words[:1]
    if words[0] in ("python", "accelerate"):
        module = words.index("-m") + 1
        program, words = ["python", "-m", words[module]], words[module:]
    subcommands = list(itertools.takewhile(re.compile(r"[a-z]+").fullmatch, words[1:]))
    options = [word.split("=")[0] for word in words[1:] if re.match(r"--?[a-zA-Z]", word)]
    return (*program, *subcommands), options
