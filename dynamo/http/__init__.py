"""HTTP for any service: the embedded server, `@api` routes, error envelope, Prometheus pages."""
