"""Calls between processes: discovery, client, connections, server, and what crosses the wire."""
