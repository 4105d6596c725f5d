r"""Prompt templates: `{red|blue} vase, {oil painting|photo}` and `a __colour__ vase` stand for several prompts.

| written | stands for |
|---|---|
| `{a\|b\|c}` | one of the alternatives; each may hold templates again, or be empty |
| `__name__` | one line of name.txt in the folder of wildcards; a line may hold templates again; blank lines and lines that begin with # are skipped |
| `\{` `\}` `\|` `\_` | the character itself |

Braces without alternatives and objects of JSON are text, except for templates inside. Other constructs that people
write for web UIs (`{2$$a|b}`, `{0.5::a|b}`, `${x=a}`, `__a*__`) are refused by name.
"""  # noqa: E501 - a row of a table

import bisect
import itertools
import math
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from sage.data.markup import markup
from sage.data.rows import Rejected, read_below
from sage.errors import ConfigurationError, DataError

LIMIT = 10_000  # prompts of one template
_DEEPEST = 20  # templates inside templates
_FILE = 16 << 20  # bytes of a wildcard file
_ESCAPE = re.compile(r"\\([{}|_])")
_WILDCARD = re.compile(r"__([^_\s{}|](?:[^{}|]{0,98}?[^_\s{}|])?)__")
_PLAIN = re.compile(r"[^{}|\\_]+")
_NAME = re.compile(r"[A-Za-z0-9][\w .-]*(?:/[A-Za-z0-9][\w .-]*)*")
_OBJECT = re.compile(r'\{\s*"(?:[^"\\]|\\.)*"\s*:')
_REFUSED = (
    (re.compile(r"\{\s*[\d-]+\s*\$\$"), "a choice of several alternatives"),
    (re.compile(r"\$\{"), "a variable"),
    (re.compile(r"\{\s*[~@!]"), "a choice of sampler"),
    (re.compile(r"[{|]\s*\d*\.?\d+\s*::"), "a weight of an alternative"),
)
# As certain as a pattern can be, for lists that are not templates: JSON always has a quote in its braces.
_WRITTEN = re.compile(r'\{[^{}"|]*\|[^{}"]*\}|(?<!\w)__[A-Za-z0-9][\w/-]*?__(?!\w)')


@dataclass(frozen=True)
class Expansion:
    """The prompts of some templates, and the number of the template that each comes from: its share key."""

    prompts: list[str]
    templates: list[int]


def expand(
    templates: str | Sequence[str],
    wildcards: Path | str | None = None,
    sample: int | None = None,
    seed: int = 0,
    literal: bool = False,
) -> Expansion:
    """Return the prompts that templates stand for.

        found = expand("{red|blue} vase, {oil painting|photo}")
        pipe(found.prompts, share_key=found.templates)

    templates  one template or several
    wildcards  folder of the files that `__name__` stands for
    sample     number of prompts drawn from each template without repetition; None: all, the last alternatives vary
               first. A larger sample begins with the prompts of a smaller one
    seed       of the draws, which also depend on the template, and on nothing else
    literal    whether markup of web UIs, `(word:1.3)` and the like, is text; else it is refused

    Raises DataError if a template is malformed, stands for more than LIMIT prompts, or needs a file that is missing.
    """
    syntax = Syntax(True, None if wildcards is None else Path(wildcards), sample, seed, literal)
    texts = [templates] if isinstance(templates, str) else templates
    found = [syntax.prompts(text) for text in texts]
    if not literal:
        for prompt in itertools.chain(*found):
            check(prompt)
    return Expansion([*itertools.chain(*found)], [number for number, part in enumerate(found) for _ in part])


@dataclass(frozen=True)
class Syntax:
    """How prompts are written; by default as text, and what looks like a template or markup is refused.

    expand     whether prompts are templates
    wildcards  folder of the files that `__name__` stands for; None: there is none
    sample     number of prompts drawn from each template; None: all
    seed       of the draws
    literal    whether everything that is not expanded is text
    """

    expand: bool = False
    wildcards: Path | None = None
    sample: int | None = None
    seed: int = 0
    literal: bool = False
    _files: "dict[str, _One]" = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Raise ConfigurationError if the size of the sample is not in 1..LIMIT."""
        if self.sample is not None and not 1 <= self.sample <= LIMIT:
            raise ConfigurationError(f"{self.sample} prompts of each template were asked for; give 1 to {LIMIT}")

    def prompts(self, text: str) -> list[str]:
        """Return the prompts that a text stands for, not yet checked for markup; raise DataError if it is malformed."""
        if not self.expand:
            if not self.literal and (found := template(text)):
                raise DataError(f"{found} is a wildcard; expand it (--expand all), or say that it is text (--literal)")
            return [text]
        tree = _Parser(text, self).parsed()
        if self.sample is None and tree.count > LIMIT:
            raise DataError(
                f"the template stands for {_amount(tree.count)} prompts, more than {LIMIT:,}; draw some of them "
                "(--expand 100), or write fewer alternatives"
            )
        numbers = range(tree.count) if self.sample is None else self._drawn(text, tree.count)
        return [" ".join(tree.text(number).split()) for number in numbers]

    def _drawn(self, text: str, count: int) -> Iterator[int]:
        """Yield the numbers of a random sample: the first steps of a shuffle of all."""
        assert self.sample is not None
        generator, moved = random.Random(f"{self.seed}:{text}"), dict[int, int]()
        for place in range(min(self.sample, count)):
            other = generator.randrange(place, count)
            yield moved.get(other, other)
            moved[other] = moved.get(place, place)


def template(text: str) -> str | None:
    """Return the first part of a text that looks like a template, or None."""
    found = _WRITTEN.search(text)
    return found and found[0]


def check(prompt: str) -> None:
    """Raise DataError if a prompt holds markup of web UIs."""
    if found := markup(prompt):
        raise DataError(
            f"{found.written!r} {found.meaning} in web UIs, and would be drawn as words here; {found.remedy}, or say "
            "that it is text (--literal)"
        )


@dataclass(frozen=True)
class _Text:
    value: str
    count: int = 1

    def text(self, number: int) -> str:
        return self.value


class _All:
    """Parts one after the other."""

    def __init__(self, parts: "Sequence[_Node]") -> None:
        self._parts = parts
        self.count: int = math.prod(part.count for part in parts)

    def text(self, number: int) -> str:
        texts = []
        for part in reversed(self._parts):
            number, own = divmod(number, part.count)
            texts.append(part.text(own))
        return "".join(reversed(texts))


class _One:
    """One of several alternatives."""

    def __init__(self, alternatives: "Sequence[_Node]") -> None:
        self._alternatives = alternatives
        self._ends = [*itertools.accumulate(one.count for one in alternatives)]
        self.count: int = self._ends[-1]

    def text(self, number: int) -> str:
        place = bisect.bisect(self._ends, number)
        return self._alternatives[place].text(number - (self._ends[place - 1] if place else 0))


_Node = _Text | _All | _One


class _Parser:
    """A parser of one template; `inside` names the wildcards that it stands in, outermost first."""

    def __init__(self, text: str, syntax: Syntax, inside: tuple[str, ...] = ()) -> None:
        self._text, self._syntax, self._inside = text, syntax, inside
        self._place = 0

    def parsed(self) -> _Node:
        for pattern, what in _REFUSED:
            if refused := pattern.search(self._text):
                raise DataError(f"{refused[0]!r} begins {what}, which is not supported; write the alternatives out")
        found = self._sequence(stops="", depth=len(self._inside))
        if self._place < len(self._text):
            raise DataError(f"}} at character {self._place + 1} closes nothing; remove it, or write \\}} for the brace")
        return found

    def _sequence(self, stops: str, depth: int) -> _Node:
        """Parse until one of the characters `stops`, or until a closing brace."""
        if depth > _DEEPEST:
            raise DataError(f"templates stand in one another more than {_DEEPEST} deep; write them flat")
        parts: list[_Node] = []
        while self._place < len(self._text) and (character := self._text[self._place]) not in (*stops, "}"):
            if plain := _PLAIN.match(self._text, self._place):
                self._place = plain.end()
                parts.append(_Text(plain[0]))
            elif escaped := _ESCAPE.match(self._text, self._place):
                self._place = escaped.end()
                parts.append(_Text(escaped[1]))
            elif character == "{":
                parts.append(self._braces(depth))
            elif wildcard := _WILDCARD.match(self._text, self._place):
                self._place = wildcard.end()
                parts.append(self._file(wildcard[1]))
            else:
                self._place += 1
                parts.append(_Text(character))
        return _All(parts)

    def _braces(self, depth: int) -> _Node:
        start, stops = self._place, "" if _OBJECT.match(self._text, self._place) else "|"
        alternatives: list[_Node] = []
        while not alternatives or self._text[self._place] == "|":
            self._place += 1
            alternatives.append(self._sequence(stops, depth + 1))
            if self._place == len(self._text):
                raise DataError(f"{{ at character {start + 1} is never closed; close it, or write \\{{ for the brace")
        self._place += 1
        if len(alternatives) == 1:
            return _All([_Text("{"), *alternatives, _Text("}")])
        return _One(alternatives)

    def _file(self, name: str) -> _Node:
        if not _NAME.fullmatch(name):
            raise DataError(f"__{name}__ is not the name of one file; write \\__ if it is text")
        if name in self._inside:
            raise DataError(f"wildcards stand for themselves: {' > '.join((*self._inside, name))}; break the circle")
        if name not in self._syntax._files:
            self._syntax._files[name] = self._read(name)
        return self._syntax._files[name]

    def _read(self, name: str) -> _One:
        folder = self._syntax.wildcards
        if folder is None:
            raise DataError(f"__{name}__ stands for a file; name its folder (--wildcards), or write \\__ if it is text")
        try:
            content = read_below(folder, PurePosixPath(f"{name}.txt"), _FILE).decode("utf-8-sig")
        except Rejected as error:
            raise DataError(f"__{name}__ in {folder}: {error.detail}; add it, or write \\__ if it is text") from error
        except UnicodeDecodeError as error:
            raise DataError(f"{folder / name}.txt is not UTF-8 ({error.reason}); save it as UTF-8") from error
        lines = [line for line in map(str.strip, content.splitlines()) if line and not line.startswith("#")]
        if not lines:
            raise DataError(f"{folder / name}.txt has no line to choose from; write one alternative per line")
        alternatives = []
        for number, line in enumerate(lines, start=1):
            try:
                alternatives.append(_Parser(line, self._syntax, (*self._inside, name)).parsed())
            except DataError as error:
                raise DataError(f"{name}.txt, alternative {number}: {error}") from error
        return _One(alternatives)


def _amount(count: int) -> str:
    return f"{count:,}" if count < 10**12 else "more than 10^12"
