"""The package `dynamo.sdk.core` of ai-dynamo 0.3, for imports written then."""
