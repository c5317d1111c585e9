"""How often the statistics are right, by simulation: `python -m benchmarks.statistics [--fast]`.

Everything in `benchmarks` is run with -m: as a script its folder would come first, and this package in the place of
Python's `statistics`.
"""
