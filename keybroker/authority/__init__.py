"""The room that decides, limits and records. It reaches the key only through a worker, and only after the intent is durable."""
