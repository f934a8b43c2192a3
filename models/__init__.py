"""Adapters, one file per model family, and `mini`, the embedded trained model.

Importing this package loads no heavy dependency; a lookup of an adapter imports transformers.
"""

if __name__ != "tokenprune.models":
    raise ImportError("import tokenprune.models, not models: the folder is part of the tokenprune package")
