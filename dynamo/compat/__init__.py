"""What exists for graphs and components of ai-dynamo 0.1 to 0.3 alone; the paths that they import from are doors to it."""
