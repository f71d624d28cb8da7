"""Every argument and option of every command says what it is for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

import typer

from hf_binaryformer.cli import app
from hf_binaryformer.commands import prepare
from hf_binaryformer.training import autoencoder, classification, encode_tokens, sampler, segmentation


def walk(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    """A command and all below it."""
    yield name, command
    for word, below in getattr(command, "commands", {}).items():
        yield from walk(below, f"{name} {word}")


def single(function: Any) -> typer.Typer:
    """A program of one command."""
    program = typer.Typer()
    program.command()(function)
    return program


def silent(name: str, program: typer.Typer) -> list[str]:
    """Commands, arguments and options without a text."""
    found = []
    for words, command in walk(typer.main.get_command(program), name):
        found += [] if command.help else [words]
        found += [f"{words} {param.name}" for param in command.params if not getattr(param, "help", None)]
    return found


def test_every_option_has_a_text():
    programs = {"binaryformer": app, "prepare": prepare.app}
    modules = (autoencoder, classification, encode_tokens, sampler, segmentation)
    programs |= {module.__name__: single(module.main) for module in modules}
    assert sum((silent(name, program) for name, program in programs.items()), []) == []
    assert len([*walk(typer.main.get_command(prepare.app), "")]) > 10


def test_an_option_without_a_text_is_seen():
    def command(seed: Annotated[int, typer.Option()] = 0) -> None:
        """Do nothing."""

    assert silent("x", single(command)) == ["x seed"]
