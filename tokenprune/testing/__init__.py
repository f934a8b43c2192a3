"""Tools for authors of strategies and adapters.

* `conformance`: checks that a strategy fulfills the contract of the library (`tokenprune check`).
* `examples`: a tiny model of each family with random weights, and inputs for it; found by adapter class.
* `families`: tiny models with random weights, and their processors, of all model families.
* `tiny_models`: tiny LLaVA models, a tokenizer, and random images.
* `encoded_images`: encoded images with random signals.
"""
