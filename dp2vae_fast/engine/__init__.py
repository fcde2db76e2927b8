"""DP-SGD for any module; knows nothing of VAEs. Along the way of one step:

* ``sampling``, ``loader``: who is in the batch, on coins of ``keystream``;
* ``capture``: what every layer saw, by ``hooks`` that put a ``tap`` on its output, within ``calls`` of the whole model
  (``traced`` under ``torch.compile``), into the ``book`` of the batch; ``guards``, ``verify`` (which lets
  the first call ``repeat``): what must not pass in silence;
* ``layers``, ``fallback``: from that to per-sample ``gradients``, formed or as ``products``: ``plan``, by ``cost`` or
  ``timing`` (``planning``: before any step);
* ``clipping``, ``precision``: factors, and what they guarantee after rounding;
* ``optimizer``, ``pending``, ``update``: sum, what it is of, noise and the inner optimizer's step; ``captured``: all
  but noise and step replayed as one graph; ``distributed``: over several processes;
* ``counting``, ``accounting``: what has been spent.

``privacy_engine`` and ``module`` give all this the face of Opacus. ``audit`` tries to break it.
"""
