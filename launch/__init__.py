"""How a run starts: one stage, a pipeline of them, an export, a report."""
