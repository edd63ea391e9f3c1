"""The room that faces the network: TLS, HTTP and JSON end here; what goes on to the authority is typed and bounded."""
