"""The top-level links are for readers: their files would be collected a second time under another name."""

collect_ignore = ["models", "inference"]
