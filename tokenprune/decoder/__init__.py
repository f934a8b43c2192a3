"""Execution of strategies inside the LLM: layers behind a cut run on the tokens that remain."""
