"""Developers' tools that prove the Triton kernels without a GPU. Run from the repository's root; not in the wheel."""
