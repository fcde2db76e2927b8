"""Triton kernels; importing this package registers each as the ``triton`` backend of its op."""
