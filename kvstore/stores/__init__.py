"""Where payloads are kept: one contract, a file a backend. Bytes in and out; nothing here knows what they mean."""
