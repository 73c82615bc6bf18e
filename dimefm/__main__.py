"""`python -m dimefm`: the same as the `dimefm` command."""

from dimefm.cli import main

if __name__ == "__main__":
    main()
