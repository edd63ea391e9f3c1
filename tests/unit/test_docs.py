"""The documents against the code: links lead somewhere, and every name in the code is in the reference, and the other way round."""

from __future__ import annotations

import asyncio
import enum
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest
import typer
from prometheus_client.parser import text_string_to_metric_families
from starlette.routing import Route

from keybroker import config
from keybroker.audit import chain, leaf
from keybroker.authority.metrics import AuthorityMetrics
from keybroker.authority.policy import grants, loader
from keybroker.authority.trial import cases, findings
from keybroker.cli import app as program
from keybroker.cli.exits import ExitStatus
from keybroker.errors import RefusalError
from keybroker.frontend import problems
from keybroker.frontend.app import DOCUMENT, Application
from keybroker.frontend.authority_link import AuthorityLink
from keybroker.frontend.exchange import Client, HttpRequest
from keybroker.frontend.metrics import FrontendMetrics
from keybroker.frontend.operations import Operations
from keybroker.identity import deny_list, x509_svid
from keybroker.model.decision import Obligation, PolicyAnswer, PolicyInput
from keybroker.model.record import Outcome, RecordKind
from keybroker.model.request import SignBody
from keybroker.process import EXIT_CONFIG, EXIT_STORE
from keybroker.tracing import Tracer
from keybroker.yaml_document import YamlDocument

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    page.relative_to(ROOT).as_posix()
    for place in (ROOT, *(ROOT / name for name in ("docs", "policies", "softhsm")))
    for page in (place.glob("*.md") if place == ROOT else place.rglob("*.md"))
)
REFERENCE = ROOT / "docs" / "reference"
CONNECTION = {"--url", "--svid", "--bundle", "--broker-id"}
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
_CODE = re.compile(r"^```.*?^```$|`[^`\n]+`", re.DOTALL | re.MULTILINE)
_NAME = re.compile(r"`([^`]+)`")


def text_of(page: str) -> str:
    return (ROOT / page).read_text()


def slugs(text: str) -> set[str]:
    """The anchors that a page has: its headings as repository hosts name them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def section(page: str, heading: str) -> str:
    """What stands under a heading of a reference page, up to the next one."""
    found = re.search(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#|\Z)", (REFERENCE.parent / page).read_text(), re.DOTALL | re.MULTILINE)
    assert found, f"{page} has no heading {heading!r}"
    return found[1]


def rows(page: str, heading: str) -> list[list[str]]:
    """The cells of the first table under a heading, without its head."""
    table = re.search(r"(?:^\|.*\n)+", section(page, heading), re.MULTILINE)
    assert table, f"{page}, {heading}: no table"
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table[0].splitlines()[2:]]


def names(page: str, heading: str, column: int = 0) -> list[str]:
    """The names in code spans in one column of a table, all of them."""
    return [name for row in rows(page, heading) for name in _NAME.findall(row[column])]


def fields(struct: Any) -> set[str]:
    return set(struct.__struct_encode_fields__)


def values(kinds: type[enum.Enum]) -> set[str]:
    return {each.value for each in kinds}


@pytest.mark.parametrize("page", PAGES)
def test_links_of_page_lead_somewhere(page: str) -> None:
    targets = [target for target in _LINK.findall(_CODE.sub("", text_of(page))) if "://" not in target]
    for target in targets:
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), f"{page}: {target}"
        assert not anchor or anchor in slugs(file.read_text()), f"{page}: {target}"


def test_index_names_every_page() -> None:
    linked = {
        ((ROOT / index).parent / target.partition("#")[0]).resolve()
        for index in ("docs/README.md", "docs/adr/README.md", "README.md")
        for target in _LINK.findall(text_of(index))
        if "://" not in target
    }
    assert {page for page in PAGES if page.startswith("docs/") and (ROOT / page).resolve() not in linked} <= {"docs/README.md"}


def test_problem_codes_are_those_of_the_code_with_their_statuses() -> None:
    documented = {_NAME.findall(row[0])[0]: int(row[1]) for row in rows("reference/http.md", "Problem codes")}
    assert documented == {code: status for code, (status, _) in problems.RULES.items()}
    assert set(documented) == RefusalError.registry.keys() - {""}


def test_routes_are_those_of_the_frontend() -> None:
    metrics = FrontendMetrics()
    link: AuthorityLink = object()  # type: ignore[assignment]  # nothing is asked
    app = Application(link, metrics, Tracer("frontend", config.TelemetryConfig()))
    answer = asyncio.run(app.answer(HttpRequest(Client((), "192.0.2.1"), "GET", DOCUMENT, b"", [], b"")))
    described = json.loads(answer.body)["paths"]
    served = {f"{method.upper()} {path}" for path, item in described.items() for method in item} | {f"GET {DOCUMENT}"}
    assert set(names("reference/http.md", "Routes")) == served
    operations = Operations(link, metrics, lambda: False).app().routes
    assert set(re.findall(r"^\| `GET (/[a-z]+)` \|", section("reference/http.md", "Routes"), re.MULTILINE)) == {
        route.path for route in operations if isinstance(route, Route)
    }


def test_sign_request_has_the_members_of_the_code() -> None:
    assert set(names("reference/http.md", "Sign")) == fields(SignBody)


@pytest.mark.parametrize(
    ("heading", "struct"),
    [
        ("`frontend`", config.FrontendConfig),
        ("`authority`", config.AuthorityConfig),
        ("`authority.checkpoints`", config.CheckpointsConfig),
        ("`authority.policy`", config.PolicyConfig),
        ("`authority.policy.bundle`", config.BundleConfig),
        ("`authority.policy.opa`", config.OpaConfig),
        ("`authority.tokens.NAME`", config.TokenLink),
        ("`authority.keys.NAME`", config.KeyConfig),
        ("`authority.keys.NAME.versions`", config.KeyVersionConfig),
        ("`authority.shadow`", config.ShadowConfig),
        ("`hsm`", config.HsmConfig),
        ("`hsm.tokens.NAME`", config.TokenConfig),
        ("`hsm.tokens.NAME.log`", config.LogKeyConfig),
        ("`authority.notices`", config.NoticesConfig),
        ("`hsm.tokens.NAME.notices`", config.NoticeKeyConfig),
        ("`courier`", config.CourierConfig),
        ("`courier.hooks.NAME`", config.HookConfig),
        ("`telemetry`", config.TelemetryConfig),
    ],
)
def test_configuration_fields_are_those_of_the_code_with_their_defaults(heading: str, struct: Any) -> None:
    documented = {_NAME.findall(row[0])[0]: row[2] for row in rows("reference/configuration.md", heading)}
    assert set(documented) == fields(struct)
    for field in msgspec.structs.fields(struct):
        said = documented[field.name]
        if field.required:
            assert said.startswith("required"), field.name
        elif isinstance(field.default, int | float | str) and field.default != "":
            assert said == f"`{field.default}`", field.name
        else:
            assert not said.startswith("required"), field.name


def test_deny_list_is_described_as_it_is_read() -> None:
    assert set(names("reference/configuration.md", "Deny list")) == fields(deny_list.Denial)


def test_sections_of_the_configuration_are_those_of_the_code() -> None:
    headings = re.findall(r"^## `([a-z]+)`$", text_of("docs/reference/configuration.md"), re.MULTILINE)
    assert set(headings) == fields(config.Config)


def test_metrics_are_those_that_are_exported_with_their_labels() -> None:
    frontend, authority = FrontendMetrics(), AuthorityMetrics(["k"])
    authority.refused("denied")
    authority.security("file-refused")
    frontend.answered("/v1/whoami", 200)
    frontend.handshake("ok")
    exported: dict[str, tuple[str, set[str]]] = {}
    for text in (frontend.text(), authority.text({"t": (1, 1)}, 1, 0, is_writable=True)):
        for family in text_string_to_metric_families(text.decode()):
            if family.name.endswith("_created"):
                continue
            name = f"{family.name}_total" if family.type == "counter" else family.name
            labels = {label for sample in family.samples for label in sample.labels} - {"le"}
            exported[name] = (family.type, labels)
    documented = {
        _NAME.findall(name)[0]: (kind, set(_NAME.findall(labels))) for name, kind, labels, _ in rows("reference/metrics.md", "Metrics")
    }
    assert documented == exported


def commands(group: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        else:
            yield " ".join(("keybroker", *path, name)), command


def test_commands_are_those_of_the_program_with_their_options() -> None:
    known = {
        name: {option for parameter in command.params if parameter.param_type_name == "option" for option in parameter.opts} - CONNECTION
        for name, command in commands(typer.main.get_command(program))
    }
    headings = re.findall(r"^### `(.+)`$", text_of("docs/reference/cli.md"), re.MULTILINE)
    assert {name: set(names("reference/cli.md", f"`{name}`")) for name in headings} == known
    assert set(names("reference/cli.md", "Connection")) == CONNECTION


def test_findings_of_the_policy_check_are_those_of_the_code() -> None:
    documented = {_NAME.findall(code)[0]: severity for code, severity, _ in rows("reference/cli.md", "Findings")}
    assert documented == {code: severity.value for code, (severity, _) in findings.CODES.items()}


def test_cases_of_a_policy_are_described_as_they_are_read() -> None:
    assert set(names("reference/cli.md", "Cases of a policy")) == fields(cases.Case)


def test_exit_statuses_are_those_of_the_program() -> None:
    assert {int(row[0]) for row in rows("reference/cli.md", "Exit statuses")} == {*map(int, ExitStatus), EXIT_CONFIG, EXIT_STORE}


def test_record_is_described_as_it_is_written() -> None:
    assert set(names("reference/record.md", "Fields")) == fields(leaf._Leaf)
    assert set(names("reference/record.md", "Kinds")) == values(RecordKind)
    assert set(names("reference/record.md", "Outcomes")) == values(Outcome)
    assert set(names("reference/record.md", "Rules of the check")) == found_in("audit/chain.py", r'(?:yield |index, )"([a-z-]+)"')


def test_findings_of_the_store_check_are_those_of_the_code() -> None:
    known = found_in("authority/store/fsck.py", r'"([a-z]+(?:-[a-z]+)+)"') | found_in("authority/store/row.py", r'yield "([a-z-]+)"')
    known |= found_in("authority/store/fsck_operations.py", r'"([a-z]+-(?:not-(?:listed|on-record)|end))"')
    known = {name for name in known if not name.startswith("column-")} - {"key-pinned"}  # a family of its own; a change, not a finding
    assert set(names("reference/record.md", "Check it on the broker's host")) == known


def test_examples_of_records_follow_from_each_other() -> None:
    leaves = [line.encode() for line in re.findall(r"^(\{\"approvals.*\})$", text_of("docs/reference/record.md"), re.MULTILINE)]
    assert len(leaves) == 2
    first = leaf.decode(leaves[0])
    assert leaf.decode(leaves[1])["trail"]["previous"] == leaf.leaf_hash(leaves[0]).hex()
    checker = chain.ChainChecker(size=first["index"])
    assert [fault for each in leaves for fault in checker.take(each)] == []


def test_security_events_are_those_of_the_code() -> None:
    assert set(names("reference/record.md", "Security")) == found_in("authority", r'note\("([a-z-]+)"|"event": "([a-z-]+)"')


def test_grants_are_described_as_they_are_read() -> None:
    assert set(names("reference/grants.md", "A file")) == fields(grants.GrantFile)
    assert set(names("reference/grants.md", "A grant")) == fields(grants.Grant)
    assert set(names("reference/grants.md", "A deny")) == fields(grants.Deny)
    for heading, struct in (("Hours", grants.Hours), ("Limits", grants.LimitRule), ("Quorum", grants.Quorum)):
        assert set(names("reference/grants.md", heading)) == fields(struct)
    assert set(names("reference/policy.md", "Obligations")) == fields(Obligation)
    assert set(names("reference/grants.md", "Operations")) == set(get_args(grants.Denied))
    not_built = set(_NAME.findall(section("reference/grants.md", "Not there yet").partition("belong to")[0]))
    assert not_built == grants.NOT_BUILT


def test_policy_is_described_as_it_is_asked() -> None:
    assert set(names("reference/policy.md", "Input")) == fields(PolicyInput)
    assert set(names("reference/policy.md", "Answer")) == fields(PolicyAnswer)
    for heading, struct in (("Input", PolicyInput), ("Answer", PolicyAnswer)):
        example = re.search(r"```json\n(.*?)```", section("reference/policy.md", heading), re.DOTALL)
        assert example
        msgspec.json.decode(example[1], type=struct, strict=True)
    reasons = {name for name in names("reference/policy.md", "Reasons") if "ID" not in name}
    assert reasons == set(re.findall(r'missing := \["([a-z-]+)"\]', text_of("policies/keybroker.rego")))


def test_rules_for_svids_are_those_of_the_code() -> None:
    ids = found_in("model/identity.py", r'SpiffeIdError\("([a-z-]+)"\)')
    assert set(names("explanation/identity.md", "The rules")) == x509_svid._TEXTS.keys() | ids
    assert set(names("explanation/identity.md", "Switches")) == x509_svid.SWITCHES.keys()


def test_rules_for_keys_are_those_of_the_code() -> None:
    page = "how-to/use-another-pkcs11-module.md"
    known = found_in("hsm/pkcs11_token.py", r'"(key-[a-z-]+)"') | found_in("authority/keyring.py", r'"(key-is-[a-z-]+)"')
    assert set(names(page, "Why a key is refused")) == known


@pytest.mark.parametrize("page", PAGES)
def test_yaml_of_page_is_what_the_broker_reads(page: str, tmp_path: Path) -> None:
    for number, block in enumerate(re.findall(r"^```yaml\n(.*?)^```$", text_of(page), re.DOTALL | re.MULTILINE)):
        first = block.partition(":")[0]
        file = tmp_path / f"{number}.yaml"
        file.write_text(block)
        if first in {"grants", "denies"}:
            place = tmp_path / f"rules-{number}"
            place.mkdir()
            file.rename(place / file.name)
            loader.load(place, frozenset())
        elif first == "cases":
            assert YamlDocument.load(file).convert(cases.CaseFile).cases
        elif first == "denied":
            deny_list.DenyList.load(file)
        elif (first in {"frontend", "authority", "hsm"} and "uri" in block) or "listen" in block or "state:" in block:
            config.load(file)


def found_in(place: str, pattern: str) -> set[str]:
    """What a pattern finds in the source of a module or a package."""
    path = ROOT / "keybroker" / place
    sources = [path] if path.is_file() else sorted(path.rglob("*.py"))
    hits = [hit for source in sources for hit in re.findall(pattern, source.read_text())]
    return {name for hit in hits for name in (hit if isinstance(hit, tuple) else (hit,)) if name}
