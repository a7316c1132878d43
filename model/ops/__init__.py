"""Attention and vocabulary operations. One folder an op: `reference.py` is the brute-force definition, `streaming.py`
the plain torch form whose memory does not grow with T^2, `README.md` the derivation. A package exports its streaming
form."""
