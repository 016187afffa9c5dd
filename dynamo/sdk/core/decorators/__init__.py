"""The package `dynamo.sdk.core.decorators` of ai-dynamo 0.3."""
