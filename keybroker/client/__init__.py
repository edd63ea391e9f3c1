"""The Python SDK of keybroker: ask for a signature, look at keys, read the record.

```python
from keybroker.client import Client

with Client("https://127.0.0.1:8443", svid=Path("svid.pem"), bundle=Path("bundle.pem")) as broker:
    signed = broker.sign("orders", "ES256", message=b"hello")
```
"""

from __future__ import annotations

from keybroker.client.broker import Client
from keybroker.client.errors import BrokerAnswerError, BrokerIdentityError, BrokerUnreachableError, SettingsError
from keybroker.client.results import Explanation, Key, KeyVersion, Record, RecordPage, SignedUse, UsePlaces, Whoami

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
