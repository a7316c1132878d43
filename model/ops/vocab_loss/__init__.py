from model.ops.vocab_loss.streaming import token_logprobs

__all__ = ["token_logprobs"]
