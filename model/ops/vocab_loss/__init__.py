from model.ops.vocab_loss.kept import KeptSets
from model.ops.vocab_loss.streaming import token_logprobs

__all__ = ["KeptSets", "token_logprobs"]
