"""Where the broker's state is durable. Two ways in: the journal's transactions write, readers page."""
