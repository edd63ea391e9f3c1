"""The Python SDK of keybroker: ask for a signature, look at keys, read the record.

```python
from keybroker.client import Client

with Client("https://127.0.0.1:8443", svid=Path("svid.pem"), bundle=Path("bundle.pem")) as broker:
    signed = broker.sign("orders", "ES256", message=b"hello")
```
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from keybroker.client.errors import BrokerAnswerError, BrokerIdentityError, BrokerUnreachableError, SettingsError
from keybroker.client.results import Explanation, Key, KeyVersion, Record, RecordPage, SignedUse, UsePlaces, Whoami

if TYPE_CHECKING:
    from keybroker.client.broker import Client

__all__ = [
    "BrokerAnswerError",
    "BrokerIdentityError",
    "BrokerUnreachableError",
    "Client",
    "Explanation",
    "Key",
    "KeyVersion",
    "Record",
    "RecordPage",
    "SettingsError",
    "SignedUse",
    "UsePlaces",
    "Whoami",
]


def __getattr__(name: str) -> Any:
    """Load `Client` when it is first used: an HTTP library takes longer to load than `keybroker --help` may take."""
    if name == "Client":
        from keybroker.client.broker import Client  # noqa: PLC0415  that is the point

        return Client
    msg = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(msg)
