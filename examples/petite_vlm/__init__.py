"""A small trained LLaVA, rebuilt from three pinned packages and a 10 MB adapter. See README.md."""
