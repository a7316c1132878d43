"""How weights change: stages, run context, loop, losses, optimiser, DeepSpeed engine, checkpoints, metrics, loss evaluation."""
