"""`python -m magicpig` is the command `magicpig`."""

from magicpig.cli import main

if __name__ == "__main__":
    main()
