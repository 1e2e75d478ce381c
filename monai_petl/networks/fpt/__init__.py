"""FPT: a side network that reads a frozen transformer's most attended keys and values."""
