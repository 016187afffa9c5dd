"""Language models: prompts and tokens, generation messages, the engine protocol, migration, disaggregation."""
