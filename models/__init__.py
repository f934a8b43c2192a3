"""Adapters, one file per model family, and `mini`, the embedded trained model.

Importing this package is light; adapters load transformers when they are looked up.
"""

if __name__ != "tokenprune.models":
    raise ImportError("import tokenprune.models, not models: the folder is part of the tokenprune package")
