"""Inference algorithms, one a file."""

if __name__ != "lmppl.inference":
    # The repository's top level links here, for readers only: imported by the short name, modules would exist twice.
    raise ImportError("import lmppl.inference, not inference")
