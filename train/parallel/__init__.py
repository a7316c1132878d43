"""How the ranks share the work beside plain data parallelism: slices of a sequence (cp), experts (ep)."""
