"""What exists for ai-dynamo 0.1 to 0.3 alone: names of its Python bindings, over the parts of this project."""
