"""Block kernels behind one interface, and the merge of their partial results."""
