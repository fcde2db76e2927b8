"""DP²-VAE itself: models, losses, the two stages, evaluation and the report."""
