"""Measuring models: windows, the forward loop, metrics and the statistics on them."""
