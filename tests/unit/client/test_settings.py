"""Where client settings come from, and which place wins."""

from __future__ import annotations

from pathlib import Path

import pytest

from keybroker.client.errors import SettingsError
from keybroker.client.settings import load
from keybroker.errors import ConfigError

FLAGS = {"url": "https://flag:1", "svid": "flag.pem", "bundle": "flag-bundle.pem", "broker_id": "spiffe://flag.example/keybroker"}
VARIABLES = {
    "KEYBROKER_URL": "https://variable:2",
    "KEYBROKER_SVID": "variable.pem",
    "KEYBROKER_BUNDLE": "variable-bundle.pem",
    "KEYBROKER_ID": "spiffe://variable.example/keybroker",
}
FILE = """\
url: https://file:3
svid: file.pem
bundle: /elsewhere/file-bundle.pem
broker_id: spiffe://file.example/keybroker
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    folder = tmp_path / ".config" / "keybroker"
    folder.mkdir(parents=True)
    (folder / "client.yaml").write_text(FILE)
    return tmp_path


def test_flags_win_over_everything(home: Path) -> None:
    chosen = load(FLAGS, {**VARIABLES, "HOME": str(home)})
    assert (chosen.url, chosen.svid, chosen.bundle) == ("https://flag:1", Path("flag.pem"), Path("flag-bundle.pem"))
    assert chosen.broker_id is not None
    assert chosen.broker_id.trust_domain == "flag.example"


def test_variables_win_over_the_file(home: Path) -> None:
    chosen = load({}, {**VARIABLES, "HOME": str(home)})
    assert (chosen.url, chosen.svid, chosen.bundle) == ("https://variable:2", Path("variable.pem"), Path("variable-bundle.pem"))


def test_the_file_is_used_where_nothing_else_is_given_and_its_paths_are_relative_to_it(home: Path) -> None:
    chosen = load(dict.fromkeys(FLAGS, ""), {"HOME": str(home)})
    assert chosen.url == "https://file:3"
    assert chosen.svid == home / ".config" / "keybroker" / "file.pem"
    assert chosen.bundle == Path("/elsewhere/file-bundle.pem")
    assert chosen.broker_id is not None
    assert chosen.broker_id.text == "spiffe://file.example/keybroker"


def test_each_setting_is_chosen_by_itself(home: Path) -> None:
    chosen = load({"url": "https://flag:1"}, {"KEYBROKER_SVID": "variable.pem", "HOME": str(home)})
    assert (chosen.url, chosen.svid, chosen.bundle) == ("https://flag:1", Path("variable.pem"), Path("/elsewhere/file-bundle.pem"))


def test_the_file_is_not_read_when_everything_is_given(home: Path) -> None:
    (home / ".config" / "keybroker" / "client.yaml").write_text("nonsense: [")
    assert load(FLAGS, {"HOME": str(home)}).url == "https://flag:1"


@pytest.mark.parametrize(
    ("missing", "flag", "variable"),
    [("url", "--url", "KEYBROKER_URL"), ("svid", "--svid", "KEYBROKER_SVID"), ("bundle", "--bundle", "KEYBROKER_BUNDLE")],
)
def test_a_missing_setting_names_its_flag_and_its_variable(missing: str, flag: str, variable: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError) as caught:
        load({**FLAGS, missing: ""}, {"HOME": str(tmp_path)})
    assert flag in str(caught.value)
    assert variable in str(caught.value)


def test_the_broker_id_may_be_missing(tmp_path: Path) -> None:
    assert load({**FLAGS, "broker_id": ""}, {"HOME": str(tmp_path)}).broker_id is None


def test_there_need_not_be_a_home() -> None:
    assert load({**FLAGS, "broker_id": ""}, {}).broker_id is None


@pytest.mark.parametrize(
    "text", ["example.org/keybroker", "spiffe://Example.org/keybroker", "spiffe://example.org/keybroker/", "spiffe://"]
)
def test_a_broker_id_that_is_no_spiffe_id_is_refused(text: str) -> None:
    with pytest.raises(SettingsError, match="--broker-id"):
        load({**FLAGS, "broker_id": text}, {})


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("url: https://a:1\nsvit: x\n", "svit"),
        ("svid: 7\n", "expected a path"),
        ("url: [", "not YAML"),
        ("url: a\nurl: b\n", "given twice"),
    ],
)
def test_a_file_that_is_not_plain_is_refused_by_name_and_line(text: str, complaint: str, home: Path) -> None:
    (home / ".config" / "keybroker" / "client.yaml").write_text(text)
    with pytest.raises(ConfigError, match=complaint) as caught:
        load({}, {"HOME": str(home)})
    assert "client.yaml:" in str(caught.value)


def test_an_empty_file_says_nothing(home: Path) -> None:
    (home / ".config" / "keybroker" / "client.yaml").write_text("")
    with pytest.raises(SettingsError, match="--url"):
        load({}, {"HOME": str(home)})
