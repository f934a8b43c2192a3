"""Tools for authors of strategies and adapters.

* `conformance`: checks that a strategy fulfills the contract of the library (`tokenprune check`).
* `examples`: `build_example(adapter_class)` returns a tiny model of a family with random weights, and inputs for it.
* `families`: the examples and the real processors of all model families.
* `tiny_models`: tiny LLaVA models, a tokenizer, and random images.
* `encoded_images`: encoded images with random signals.
"""
