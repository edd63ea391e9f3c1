"""What the host says of its clock, and which boot that is."""

from __future__ import annotations

from pathlib import Path

import pytest

from keybroker import clock
from keybroker.clock import SystemClock


def test_uptime_goes_on_and_boot_is_the_kernels_name_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KEYBROKER_BOOT_ID", raising=False)
    made = SystemClock()
    before = made.uptime_us()
    assert 0 < before <= made.uptime_us()
    assert made.boot() == Path("/proc/sys/kernel/random/boot_id").read_text().strip().replace("-", "")
    assert len(made.boot()) == 32


def test_boot_is_what_the_service_manager_names_where_the_kernel_is_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "_BOOT_ID", Path("/nowhere"))
    monkeypatch.setenv("KEYBROKER_BOOT_ID", "0123456789abcdef0123456789abcdef")
    assert SystemClock().boot() == "0123456789abcdef0123456789abcdef"
    monkeypatch.delenv("KEYBROKER_BOOT_ID")
    assert SystemClock().boot() == ""
