"""What a training run is made of: objectives, optimisers, layers and heads, sharding, steps and checkpoints.

The loop itself is ``prefopt.trainer``; it and the stages alone import this. May import ``engine`` and ``processes``.
"""
