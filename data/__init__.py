"""What a run reads: documents -> tokens -> packed sequences; tasks with pure graders; chat encoding.

Importing the package loads nothing: take what is needed from its files (`from data.stream import TokenStream`).
"""
