"""The two Pyro programs of each experiment, a page each: a model, and a guide that infers its latent text."""
