"""Whether an answer can be trusted: several algorithms beside the truth, and one by itself."""
