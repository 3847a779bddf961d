"""Studies: which learner, how much data, which compression on this device? From a design to verdicts on guidelines."""
