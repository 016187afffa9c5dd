"""The package `dynamo.sdk.core.protocol` of ai-dynamo 0.3."""
