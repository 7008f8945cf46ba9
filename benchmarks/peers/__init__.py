"""Other libraries to measure against, each in processes of its own."""
