"""What exists for code of ai-dynamo 0.1 to 0.3 alone, over this project's own parts.

Such code imports it by the paths of that time, `dynamo.llm` and others, which are doors to here.
"""
