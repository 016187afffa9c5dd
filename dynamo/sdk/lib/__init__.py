"""The package `dynamo.sdk.lib` of ai-dynamo 0.1 to 0.3, for imports written then."""
