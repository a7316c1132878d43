"""Launch scripts for several nodes, and files for schedulers rendered from a run's configuration."""
