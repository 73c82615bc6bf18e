"""`python -m dimefm.reproduce`: what `make reproduce` runs. The stages are in stages.py."""

from dimefm.reproduce.stages import main

if __name__ == "__main__":
    main()
