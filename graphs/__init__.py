"""The shipped graphs: imports and links only."""
