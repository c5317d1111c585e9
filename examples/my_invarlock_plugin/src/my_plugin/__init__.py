"""Guards, a data provider and an adapter for InvarLock."""
