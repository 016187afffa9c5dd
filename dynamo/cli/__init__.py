"""The `dynamo` command: one file a subcommand, loaded when it is run."""
