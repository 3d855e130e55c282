"""The ops: one file per family. Each declares its gate once; schemas, fakes and autograd follow (see `declare`)."""
