"""The engines: one module each, imported only when it is chosen."""
