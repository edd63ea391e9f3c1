"""The rules: loaded strictly, compiled to data, decided by Rego in a small box. A pure function of request and rules."""
