"""Guards and an adapter for InvarLock."""
