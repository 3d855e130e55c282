"""The public functions and modules: one file per family. Each module inherits its parameters from the reference."""
