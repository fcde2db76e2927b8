"""``python -m dp2vae_fast`` is ``dp2vae``."""

import sys


def main() -> None:
    """Entry point of ``dp2vae``; one line and exit code 2 where a package of the ``[train]`` extra is missing."""
    try:
        from .cli import main as run
    except ModuleNotFoundError as error:
        print(f'dp2vae: error: it needs {error.name}: pip install "dp2vae_fast[train]"', file=sys.stderr)
        sys.exit(2)
    run()


if __name__ == "__main__":
    main()
