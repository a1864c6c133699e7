"""Whether a posterior can be trusted: `compare` algorithms with the truth, `diagnose` one without, `check` a model."""
