"""DP-SGD for any module; knows nothing of VAEs. Along the way of one step:

* ``sampling``, ``loader``: who is in the batch, on coins of ``keystream``;
* ``capture``: what every layer saw in the backward pass;
* ``gradients``: from that to per-sample gradients, formed or as products, in the way that a plan chooses;
* ``clipping``, ``precision``: factors, and what they guarantee after rounding;
* ``optimizer``, ``pending``, ``update``: sum, what it is of, noise and the inner optimizer's step; ``captured``: all
  but noise and step replayed as one graph; ``distributed``: over several processes;
* ``counting``, ``accounting``: what has been spent.

``privacy_engine`` and ``module`` give all this the face of Opacus; ``opacus_samplers`` lends Opacus the layer rules.
``audit`` tries to break it.
"""
