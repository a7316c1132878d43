"""Tasks that generate their own problems and grade an answer exactly: one file a task."""
