"""The record's bytes: canonical leaves, their hashes and the chains between them. No broker is needed to check them."""
