"""PKCS#11 URIs (RFC 7512): what a broker needs of them is read strictly, comes back whole, and nothing else gets through."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keybroker.model.pkcs11_uri import MAX_URI_CHARACTERS, Pkcs11Uri, Pkcs11UriError

BASE = Path("/etc/keybroker")
REST = "?module-path=/usr/lib/module.so&pin-source=file:/run/pin"
TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=40)
SEGMENT = st.text(st.characters(exclude_characters="\0/", exclude_categories=["Cs"]), min_size=1, max_size=30).filter(lambda s: s != ".")
PATHS = st.lists(SEGMENT, min_size=1, max_size=4).map(lambda parts: Path("/", *parts))


def parts_of(uri: Pkcs11Uri) -> tuple[str, str, str, str, Path, Path]:
    return uri.token, uri.serial, uri.manufacturer, uri.model, uri.module_path, uri.pin_file


@given(TEXT.filter(bool), TEXT, TEXT, TEXT, PATHS, PATHS)
def test_uri_comes_back_whole_from_its_text(token: str, serial: str, manufacturer: str, model: str, module: Path, pin: Path) -> None:
    uri = Pkcs11Uri(token, serial, manufacturer, model, module, pin)
    assert parts_of(Pkcs11Uri.parse(str(uri), Path("/elsewhere"))) == parts_of(uri)


@given(st.text(st.characters(), max_size=200) | st.from_regex(r"pkcs11:[ -~]{0,120}", fullmatch=True))
def test_any_text_is_a_uri_or_refused_and_a_uri_keeps_its_meaning(text: str) -> None:
    try:
        uri = Pkcs11Uri.parse(text, BASE)
    except Pkcs11UriError:
        return
    assert uri.module_path.is_absolute()
    assert uri.pin_file.is_absolute()
    assert parts_of(Pkcs11Uri.parse(str(uri), BASE)) == parts_of(uri)


@given(st.sampled_from(["token", "serial", "manufacturer", "model"]), TEXT.filter(bool), st.data())
def test_every_way_to_escape_a_value_means_the_same(name: str, value: str, data: st.DataObject) -> None:
    escaped = "".join(
        char if char.isascii() and char.isalnum() and not data.draw(st.booleans()) else "".join(f"%{byte:02x}" for byte in char.encode())
        for char in value
    )
    assert getattr(Pkcs11Uri.parse(f"pkcs11:{name}={escaped}{REST}", BASE), name) == value


@given(st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1, max_size=30))
def test_pin_in_the_uri_is_refused_and_never_repeated(pin: str) -> None:
    with pytest.raises(Pkcs11UriError, match="write it to a file") as caught:
        Pkcs11Uri.parse(f"pkcs11:token=t?module-path=/m&pin-value=~{pin}~", BASE)
    assert f"~{pin}~" not in str(caught.value)


SOFTTOKEN = "token=The%20Software%20PKCS%2311%20Softtoken;manufacturer=Snake%20Oil,%20Inc.;model=1.0"


# The examples of RFC 7512, section 3. Those that name objects, slots or modules by name say more, or less, than a broker takes.
@pytest.mark.parametrize(
    ("example", "error"),
    [
        ("pkcs11:", "name the token"),
        ("pkcs11:object=my-pubkey;type=public", "`object`"),
        ("pkcs11:object=my-key;type=private?pin-source=file:/etc/token", "`object`"),
        (f"pkcs11:{SOFTTOKEN};object=my-certificate;type=cert;id=%69%95%3E%5C%F4%BD%EC%91;serial=?pin-source=file:/p", "`id` is not UTF-8"),
        ("pkcs11:object=my-sign-key;type=private?module-name=mypkcs11", "`object`"),
        ("pkcs11:object=my-sign-key;type=private?module-path=/mnt/libmypkcs11.so.1", "`object`"),
        ("pkcs11:token=Software%20PKCS%2311%20softtoken;manufacturer=Snake%20Oil,%20Inc.?pin-value=the-pin", "write it to a file"),
        ("pkcs11:slot-description=Sun%20Metaslot", "`slot-description`"),
        ("pkcs11:library-manufacturer=Snake%20Oil,%20Inc.;library-description=Soft%20Token%20Library;library-version=1.23", "`library-man"),
        ("pkcs11:token=My%20token%25%20created%20by%20Joe;library-version=3;id=%01%02%03%Ba%dd%Ca%fe%04%05%06", "`id` is not UTF-8"),
        ("pkcs11:token=A%20name%20with%20a%20substring%20%25%3B;object=my-certificate;type=cert", "`object`"),
        ("pkcs11:token=Name%20with%20a%20small%20A%20with%20acute:%20%C3%A1;object=my-certificate;type=cert", "`object`"),
        (
            "pkcs11:token=my-token;object=my-certificate;type=cert;vendor-aaa=value-a?pin-source=file:/etc/token_pin&vendor-bbb=v",
            "`object`",
        ),
    ],
)
def test_example_of_the_specification_that_says_more_than_a_token_is_refused_by_name(example: str, error: str) -> None:
    with pytest.raises(Pkcs11UriError) as caught:
        Pkcs11Uri.parse(example, BASE)
    assert error in str(caught.value)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (f"{SOFTTOKEN};serial=", ("The Software PKCS#11 Softtoken", "", "Snake Oil, Inc.", "1.0")),
        ("token=My%20token%25%20created%20by%20Joe", ("My token% created by Joe", "", "", "")),
        ("token=A%20name%20with%20a%20substring%20%25%3B", ("A name with a substring %;", "", "", "")),
        ("token=Name%20with%20a%20small%20A%20with%20acute:%20%C3%A1", ("Name with a small A with acute: á", "", "", "")),
    ],
)
def test_token_of_an_example_of_the_specification_is_read(path: str, expected: tuple[str, str, str, str]) -> None:
    assert parts_of(Pkcs11Uri.parse(f"pkcs11:{path}{REST}", BASE))[:4] == expected


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("file:pin", BASE / "pin"),
        ("file:/run/pin", Path("/run/pin")),
        ("file:///run/pin", Path("/run/pin")),
        ("file://localhost/run/pin", Path("/run/pin")),
        ("file:////run/pin", Path("/run/pin")),
        ("file:/run/a%20pin", Path("/run/a pin")),
    ],
)
def test_pin_file_is_found(source: str, expected: Path) -> None:
    assert Pkcs11Uri.parse(f"pkcs11:token=t?module-path=/m&pin-source={source}", BASE).pin_file == expected


@pytest.mark.parametrize(
    "text",
    [
        "", "PKCS11:token=t" + REST, "pkcs12:token=t" + REST, "pkcs11:token=" + REST, "pkcs11:token=a;token=b" + REST, "pkcs11:t" + REST,
        "pkcs11:token=%z"  + REST, "pkcs11:token=%ff" + REST, "pkcs11:token=a%00" + REST, "pkcs11:model=é" + REST,
        "pkcs11:token=t;" + REST, "pkcs11:token=a b" + REST, "pkcs11:token=t\n" + REST, f"pkcs11:token={'t' * MAX_URI_CHARACTERS}{REST}",
        "pkcs11:token=t",
        "pkcs11:token=t?module-path=/m", "pkcs11:token=t?module-path=&pin-source=file:/p", "pkcs11:token=t?module-path=/m&pin-source=/p",
        "pkcs11:token=t?module-path=/m&pin-source=file:", "pkcs11:token=t?module-path=/m&pin-source=file://host/p",
        "pkcs11:token=t?module-path=/m&pin-source=|/bin/pin", "pkcs11:token=t?module-path=/m&pin-source=https://h/p",
        "pkcs11:token=t?module-path=/m&module-path=/n&pin-source=file:/p", "pkcs11:token=t?module-path=/m&pin-source=file:%2F%2Fhost/p",
    ],
)  # fmt: skip
def test_what_a_broker_cannot_use_is_refused(text: str) -> None:
    with pytest.raises(Pkcs11UriError):
        Pkcs11Uri.parse(text, BASE)


def test_longest_uri_is_taken() -> None:
    name = "t" * (MAX_URI_CHARACTERS - len("pkcs11:token=" + REST))
    assert Pkcs11Uri.parse(f"pkcs11:token={quote(name)}{REST}", BASE).token == name
