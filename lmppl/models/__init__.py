"""Latent-variable models ready to run, one a file."""

if __name__ != "lmppl.models":
    # The repository's top level links here, for readers only: imported by the short name, modules would exist twice.
    raise ImportError("import lmppl.models, not models")
