"""Programs and their sites, what an algorithm is given, and the weights of what it draws."""
