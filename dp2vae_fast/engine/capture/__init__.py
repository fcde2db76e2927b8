"""What every layer saw in a backward pass, and what must not pass in silence.

``capture`` sets up the rest. ``hooks`` replace a layer's parameters and put a ``tap`` on its output, within ``calls``
of the whole model (``traced`` under ``torch.compile``). What arrives goes into the ``book`` of the batch; a layer
without a rule is run again (``fallback``). ``guards`` and ``verify``, which lets the first call ``repeat`` and
looks for ``mixing``, refuse what would be lost, counted twice or mixed.
"""
