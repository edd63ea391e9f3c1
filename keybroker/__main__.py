"""`python -m keybroker` is `keybroker`."""

from __future__ import annotations

import sys

from keybroker.cli import main

if __name__ == "__main__":
    sys.exit(main())
