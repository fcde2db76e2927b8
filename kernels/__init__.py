"""Triton kernels; importing this package registers each as the ``triton`` backend of its op."""

from . import clip as clip
from . import noise as noise
from . import norm as norm
from . import patch as patch
