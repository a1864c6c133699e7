"""The two Pyro programs of each experiment, a page each: a model, and a guide of its latent text."""
