"""The help of each command is enough to use it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import typer

from keybroker.cli import app

Words = tuple[str, ...]


def commands(command: Any, words: Words = ()) -> Iterator[tuple[Words, Any]]:
    """Every command that does something, with the words that call it."""
    nested = getattr(command, "commands", None)
    if nested is None:
        yield words, command
    for name, each in (nested or {}).items():
        yield from commands(each, (*words, name))


COMMANDS = dict(commands(typer.main.get_command(app)))
OFFLINE = (("audit", "check"), ("audit", "verify"))
KEY = ("audit", "log-key")
WRITING = (("audit", "export"), ("audit", "prove"), ("audit", "cosign"))  # a file, not to standard output
CLOCK = [("clock", "show"), ("clock", "acknowledge")]
ASKERS = {"sign", "verify", "whoami", "keys", "audit", "operations", "break-glass", "freeze", "unfreeze", "freezes"}
CHANGING = [("policy", "live"), ("policy", "propose")]
ASKING = [words for words in COMMANDS if (words[0] in ASKERS and words not in {*OFFLINE, KEY}) or words in CHANGING]
TRYING = [words for words in COMMANDS if words[0] == "policy" and words not in CHANGING]
WEBHOOKS = [("webhooks", "dead-letters"), ("webhooks", "resend")]
PRINTING = [*(words for words in ASKING if words not in WRITING), *CLOCK, *TRYING, *WEBHOOKS, *OFFLINE, ("check",), ("dev", "init")]
OPTIONS = re.compile(r"(?<![\w-])--?[a-z][a-z-]*")


def test_commands_are_those_of_the_contract() -> None:
    assert {" ".join(words) for words in COMMANDS} == {
        "dev init", "serve", "frontend", "authority", "hsm", "courier",
        "webhooks dead-letters", "webhooks resend", "check", "sign", "verify", "whoami",
        "freeze", "unfreeze", "freezes", "break-glass open", "break-glass close", "break-glass list",
        "policy live", "policy propose", "keys list", "keys show", "keys public",
        "operations list", "operations show", "operations approve", "operations deny", "operations redeem",
        "audit tail", "audit query", "audit show", "audit impact", "audit check",
        "clock show", "clock acknowledge",
        "policy check", "policy test", "policy simulate", "policy diff", "policy replay", "policy bundle", "policy shadow",
        "audit export", "audit verify", "audit prove", "audit cosign", "audit log-key", "witness",
    }  # fmt: skip


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_help_has_examples_of_this_command_with_options_that_exist(words: Words) -> None:
    command = COMMANDS[words]
    examples = [line.strip() for line in command.help.partition("Examples:")[2].splitlines() if line.strip()]
    assert any(f"keybroker {' '.join(words)}" in example for example in examples)
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)} | {"--help"}
    for example in examples:
        ours = example.partition("keybroker ")[2].partition("|")[0]
        assert set(OPTIONS.findall(re.sub(r'"[^"]*"', "", ours))) <= known, example


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_option_says_what_it_is(words: Words) -> None:
    assert [parameter.name for parameter in COMMANDS[words].params if not getattr(parameter, "help", "")] == []


@pytest.mark.parametrize("words", PRINTING, ids=" ".join)
def test_every_command_that_prints_data_can_print_json(words: Words) -> None:
    assert "--json" in {option for parameter in COMMANDS[words].params for option in parameter.opts}


@pytest.mark.parametrize("words", ASKING, ids=" ".join)
def test_every_command_that_asks_a_broker_can_be_told_which(words: Words) -> None:
    options = {option for parameter in COMMANDS[words].params for option in parameter.opts}
    assert {"--url", "--svid", "--bundle", "--broker-id"} <= options
