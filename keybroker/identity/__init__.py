"""Who is on the other end: SPIFFE bundles, X.509-SVIDs and the deny list. Rules and files; no HTTP, no sockets."""
