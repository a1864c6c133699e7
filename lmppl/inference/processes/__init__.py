"""The same on several processes: a batch's parts, sums over them, an algorithm's answers gathered."""
