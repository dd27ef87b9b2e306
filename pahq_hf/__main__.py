"""`python -m pahq_hf`: the `pahq` command, for launchers such as torchrun that take a module."""

from pahq_hf.cli.app import main

if __name__ == "__main__":
    main()
