"""Forward passes: models and adapters as they are loaded, packed rows, products, scores and answers of whole tables.

What ``prefopt.scoring`` and ``prefopt.generation`` are made of. May import ``inputs`` and ``processes``, not
``training``.
"""
