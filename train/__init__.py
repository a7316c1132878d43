"""How weights change: stages, run context, loop, losses, optimiser, engine, checkpoints, metrics, loss evaluation."""
