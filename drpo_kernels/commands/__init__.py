"""The subcommands of `python -m drpo_kernels`, one module each."""
