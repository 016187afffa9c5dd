"""The package `dynamo.sdk.cli` of ai-dynamo 0.3, for imports written then; the command line is `dynamo.cli`."""
