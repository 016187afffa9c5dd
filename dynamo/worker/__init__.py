"""One service process: everything between `python -m dynamo.worker.process` and the service's own code."""
