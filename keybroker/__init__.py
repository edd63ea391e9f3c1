"""keybroker: decides and records every use of a key that lives in an HSM."""

__version__ = "0.1.0"
