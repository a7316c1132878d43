"""What is trained, as plain single-device PyTorch: no rank, no process group. Importing it needs torch alone."""

from model.transformer import ForwardOutput, Transformer

__all__ = ["ForwardOutput", "Transformer", "from_pretrained", "save_pretrained"]


def __getattr__(name: str):
    """`model.hf` is imported at first use: it needs safetensors, the model does not."""
    if name in ("from_pretrained", "save_pretrained"):
        import model.hf

        return {"from_pretrained": model.hf.from_pretrained, "save_pretrained": model.hf.save_pretrained}[name]
    raise AttributeError(f"module 'model' has no attribute {name!r}")
