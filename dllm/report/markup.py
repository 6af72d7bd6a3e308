"""Escaping for markdown and LaTeX: model output may hold any character."""

import re

_MARKDOWN = re.compile(r"([\\`*_{}\[\]<>|#~&])")
_LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "−": "$-$",
    "–": "--",
    "×": r"$\times$",
    "±": r"$\pm$",
    "▲": r"$\uparrow$",
    "▼": r"$\downarrow$",
    "†": r"$\dagger$",
}


def markdown(text: str) -> str:
    """Text for one markdown table cell or line: special characters escaped, line breaks become spaces."""
    return _MARKDOWN.sub(r"\\\1", " ".join(str(text).split()))


def latex(text: str) -> str:
    """Text for a LaTeX table cell, on one line."""
    return "".join(_LATEX.get(letter, letter) for letter in " ".join(str(text).split()))


def fenced(text: str) -> str:
    """A markdown code block that no run of backticks inside can close."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"
