"""From what a layer saw to its per-sample gradients.

``layers`` holds the rules: each gives a ``gradient`` that is formed, or one of the ``products`` that need not be.
``plan`` chooses in which way a product is clipped and summed, by ``cost`` or ``timing``; ``planning``: before any
step.
"""
