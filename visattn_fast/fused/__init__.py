"""The public doors: one file per family with its function and its module, which inherits from the reference."""
