"""A witness of transparency logs: remembers the last checkpoint of each, and cosigns only what continues it. Anyone can run one."""
