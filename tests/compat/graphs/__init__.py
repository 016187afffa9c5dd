"""Graphs as authors wrote them for ai-dynamo 0.2 and 0.3: the style is the era's, and so are the missing annotations."""
