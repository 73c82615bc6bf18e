"""The `dimefm` command, also as `python -m dimefm`."""

from dimefm.system import stopping


def main() -> None:
    """Listen for Ctrl-C first: even the command line takes a moment to import."""
    stopping.listen()
    from dimefm.cli import main as command_line

    command_line()


if __name__ == "__main__":
    main()
