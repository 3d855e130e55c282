"""The ops: one file per family, each a declaration from which schemas, fakes and autograd follow."""
