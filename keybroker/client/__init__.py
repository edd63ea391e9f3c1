"""The Python SDK of keybroker: ask for a signature, approve what others ask for, look at keys, read the record.

```python
from keybroker.client import AUTO, Client

with Client("https://127.0.0.1:8443", svid=Path("svid.pem"), bundle=Path("bundle.pem")) as broker:
    signed = broker.sign("orders", "ES256", message=b"hello", idempotency_key=AUTO)
```

`AsyncClient` is the same for asyncio. What a broker refuses is an exception of `keybroker.errors`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from keybroker.client.asks import AUTO, RecordFilters
    from keybroker.client.broker import AsyncClient, Client
    from keybroker.client.errors import (
        BrokerAnswerError,
        BrokerIdentityError,
        BrokerUnreachableError,
        NothingToApproveError,
        PendingError,
        SettingsError,
    )
    from keybroker.client.results import (
        Explanation,
        GivenApproval,
        Key,
        KeyVersion,
        Needs,
        Operation,
        OperationPage,
        Pending,
        Record,
        RecordPage,
        SignedUse,
        Stage,
        UsePlaces,
        Whoami,
    )
    from keybroker.model.request import SignBody

_HOMES = {
    "keybroker.client.asks": ("AUTO", "RecordFilters"),
    "keybroker.client.broker": ("AsyncClient", "Client"),
    "keybroker.client.errors": (
        "BrokerAnswerError", "BrokerIdentityError", "BrokerUnreachableError", "NothingToApproveError", "PendingError", "SettingsError",
    ),
    "keybroker.client.results": (
        "Explanation", "GivenApproval", "Key", "KeyVersion", "Needs", "Operation", "OperationPage", "Pending", "Record", "RecordPage",
        "SignedUse", "Stage", "UsePlaces", "Whoami",
    ),
    "keybroker.model.request": ("SignBody",),
}  # fmt: skip

__all__ = [
    "AUTO",
    "AsyncClient",
    "BrokerAnswerError",
    "BrokerIdentityError",
    "BrokerUnreachableError",
    "Client",
    "Explanation",
    "GivenApproval",
    "Key",
    "KeyVersion",
    "Needs",
    "NothingToApproveError",
    "Operation",
    "OperationPage",
    "Pending",
    "PendingError",
    "Record",
    "RecordFilters",
    "RecordPage",
    "SettingsError",
    "SignBody",
    "SignedUse",
    "Stage",
    "UsePlaces",
    "Whoami",
]


def __getattr__(name: str) -> Any:
    """Load a name when it is first used: an HTTP library takes longer to load than `keybroker --help` may take."""
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(home), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
