"""Extension of griffe, which reads the docstrings for the site: the few habits of this package that it does not know.

One line may describe several arguments (``height, width: pixels``), fields may stand under headings of their own, names
are marked as in Sphinx, and the base class of a configuration makes it a dataclass.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

CONFIGURATIONS = ("modeling.configuration.BinaryFormerConfig",)
SECTIONS = {"Args", "Attributes", "Returns", "Raises", "Yields", "Examples"}
TOGETHER = re.compile(r"^( +)(\w+(?:, \w+)+): (.*)$")
HEADING = re.compile(r"^([A-Z][^.:]*):$")
ROLE = re.compile(r":\w+:`~?([^`]+)`")


def tidy(text: str) -> str:
    """A docstring as griffe reads it."""
    lines: list[str] = []
    given = text.splitlines()
    for number, line in enumerate(given):
        deeper = number + 1 < len(given) and re.match(r" +\w+(, \w+)*: ", given[number + 1])
        if line == "Example:":
            line = "Examples:"
        elif (heading := HEADING.match(line)) and heading[1] not in SECTIONS and deeper:
            line = f"Attributes: {heading[1].replace('`', '')}"
        if match := TOGETHER.match(line):
            indent, names, rest = match.groups()
            more = []
            for following in given[number + 1 :]:
                if not following.startswith(f"{indent} "):
                    break
                more.append(following)
            # The last name keeps the lines that follow; the others repeat them.
            for name in names.split(", ")[:-1]:
                lines += [f"{indent}{name}: {rest}", *more]
            line = f"{indent}{names.split(', ')[-1]}: {rest}"
        lines.append(line)
    return ROLE.sub(lambda match: f"`{match[1].rpartition('.')[2]}`", "\n".join(lines)).replace("``", "`")


class Docstrings(griffe.Extension):
    """Tidies each docstring when its object has been read."""

    def on_object(self, *, obj: Any, **_: Any) -> None:
        """Called for each module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = tidy(obj.docstring.value)

    def on_package(self, *, pkg: Any, **_: Any) -> None:
        """Called when all is read: transformers makes a dataclass of each configuration, which no decorator shows."""
        for name in CONFIGURATIONS:
            configuration = pkg[name]
            fields = [
                griffe.Parameter(
                    one.name, kind=griffe.ParameterKind.keyword_only, annotation=one.annotation, default=one.value
                )
                for one in configuration.attributes.values()
                if one.annotation is not None
                and one.value is not None
                and "property" not in one.labels
                and not one.name.startswith("_")
            ]
            made = griffe.Function("__init__", parameters=griffe.Parameters(*fields), returns="None")
            configuration.set_member("__init__", made)
