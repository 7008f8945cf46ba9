"""Networks: what is computed as a whole, from a model file to a native plan."""
