"""The OpenAI-compatible HTTP server: schema, endpoints, responses, streaming, metrics."""
