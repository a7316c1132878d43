"""What runs within a sandbox: the standard library alone, since nothing else of the project is mounted there.

`namespaces` builds the view and starts the interpreter (bubblewrap does so where it is installed), `jail` and `seccomp`
give up every privilege, `supervisor` is the sandbox's first process, `worker` the one in which a model's code runs.
"""
