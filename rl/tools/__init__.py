"""Tools that the policy may call in the middle of its reasoning: `tool.py` is what one is, the others are built in."""
