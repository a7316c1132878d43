"""Environments: problems that are solved with tools, each with its tools and its verifier; `environment.py` says what
one is."""
