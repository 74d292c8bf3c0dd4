"""From YAML files to what they ask for: declarations read, nodes and their ids, costs, the text of ``plan``.

Nothing here computes: no torch, numpy or pandas. May import ``inputs``, ``processes`` and the specs, losses, judges,
procedures and grids as what they declare; ``prefopt.plan`` is the way in.
"""
