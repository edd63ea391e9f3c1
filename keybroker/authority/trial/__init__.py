"""Trying a policy before it is live: checks, tests, one request, the recorded past, and what a change would change."""
