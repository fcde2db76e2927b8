"""``python -m dp2vae_fast`` is ``dp2vae``."""

from .cli import main

main()
