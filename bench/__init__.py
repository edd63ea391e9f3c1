"""Benchmarks that print ratios. `scripts/bench` runs them; docs/explanation/performance.md says how to read what they print."""
