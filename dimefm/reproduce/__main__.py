"""`python -m dimefm.reproduce`: what `make reproduce` runs. The stages are in stages.py."""

from dimefm.system import stopping

if __name__ == "__main__":
    stopping.listen()
    from dimefm.reproduce.stages import main
    from dimefm.system.machine import wait_briefly

    wait_briefly()
    main(prog_name="reproduce")
