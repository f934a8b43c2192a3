"""Tools for authors of strategies and adapters.

* `conformance`: checks that a strategy fulfills the contract of the library (`tokenprune check`).
* `families`: tiny models with random weights, and their processors, of all model families.
* `tiny_models`: tiny LLaVA models, a tokenizer, and random images.
* `encoded_images`: encoded images with random signals.
"""
