"""The room that holds PINs and PKCS#11 sessions. It signs bytes for the authority, and knows nothing of users, rules or records."""
