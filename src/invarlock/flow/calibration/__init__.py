"""Sweeps of harmless edits that produce the guards' thresholds in `tiers.yaml`."""

from __future__ import annotations

from invarlock.flow.calibration.nulls import NULL_EDITS
from invarlock.flow.calibration.sweeps import null_sweep, ve_sweep
from invarlock.flow.calibration.thresholds import rmt_thresholds, spectral_thresholds, ve_thresholds

__all__ = ["NULL_EDITS", "null_sweep", "rmt_thresholds", "spectral_thresholds", "ve_sweep", "ve_thresholds"]
