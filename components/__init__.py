"""The services of the shipped graphs: what users read first, and copy."""
