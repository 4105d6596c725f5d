"""Prompts as they are drawn: cleaned, and refused if they are written for another program."""

from sage.data.captions import clean_caption
from sage.data.markup import markup
from sage.data.rows import Rejected
from sage.data.templates import template

_LITERAL = 'or say that it is text: "literal": true'


def drawn(prompt: str, literal: bool) -> str:
    """Return a prompt as it is drawn; raise Rejected if it has none, or is not text.

    `bad_template` and `markup` are for what `sage generate` refuses by the same names; `literal` says that it is text.
    """
    text = clean_caption(prompt)
    if literal:
        return text
    if found := template(text):
        detail = f"{found[:80]!r} is a template, and the server expands none; send the prompts that it stands for"
        raise Rejected("bad_template", f"{detail}, {_LITERAL}")
    if mark := markup(text):
        remedy = "name the LoRA in the field lora and remove the tag" if mark.written.startswith("<") else "remove it"
        detail = f"{mark.written[:80]!r} {mark.meaning} in web UIs, and would be drawn as words here; {remedy}"
        raise Rejected("markup", f"{detail}, {_LITERAL}")
    return text
