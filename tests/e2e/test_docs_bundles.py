"""What the how-to about bundles says to type, typed."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

from keybroker.authority.policy.bundle import PolicyBundle
from keybroker.authority.policy.signatures import BundleKeys
from tests.policies import GOOD
from tests.worlds import PROGRAM, clean_environment

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "ship-the-policy-as-signed-bundles.md"


def test_key_and_bundle_are_made_as_the_page_says(tmp_path: Path) -> None:
    key, bundle, _ = re.findall(r"^```sh\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    for name in ("grants", "published"):
        (tmp_path / name).mkdir()
    (tmp_path / "grants" / "a.yaml").write_text(GOOD)
    environment = clean_environment() | {"PATH": f"{PROGRAM.parent}:{os.environ['PATH']}"}
    subprocess.run(["bash", "-euo", "pipefail", "-c", key + bundle], cwd=tmp_path, env=environment, check=True, timeout=60)
    keys = BundleKeys.load([tmp_path / "policy-signing.pub.pem"], "production")
    made = PolicyBundle.read((tmp_path / "published" / "bundle.tar.gz").read_bytes(), keys, "bundle")
    assert made.grants == {"a.yaml": GOOD.encode()}
