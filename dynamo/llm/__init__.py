"""Language models: the messages of generation, prompts and tokens, and the engines that compute."""
