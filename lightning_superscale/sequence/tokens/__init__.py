"""Tensors that know which of their dims counts tokens, and the rules by which torch's functions compute with a part."""
