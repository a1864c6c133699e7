"""Pyro distributions over text."""
