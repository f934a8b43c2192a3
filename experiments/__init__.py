"""Experiments: measurements that put strategies, models and tasks together."""

if __name__ != "tokenprune.experiments":
    raise ImportError("import tokenprune.experiments, not experiments: the folder is part of the tokenprune package")
