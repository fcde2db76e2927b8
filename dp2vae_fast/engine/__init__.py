"""DP-SGD for any module: capture, clip, noise, step, account. Knows nothing of VAEs."""
