"""Store: keys to bytes. Knows nothing of KV."""
