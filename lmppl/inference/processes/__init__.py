"""Several processes: they share the observations of a batch, sum losses and gradients, and gather posteriors."""
