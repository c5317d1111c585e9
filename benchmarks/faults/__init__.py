"""The fault matrix: which edits a certificate lets through, which it stops, and whether it names the right module."""
