"""Triton kernels; importing this package registers each as the ``triton`` backend of its op."""

from . import affine as affine
from . import clip as clip
from . import gradient as gradient
from . import noise as noise
from . import norm as norm
from . import patch as patch
from . import weighted as weighted
