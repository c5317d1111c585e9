"""Who scores windows: a model in torch."""
