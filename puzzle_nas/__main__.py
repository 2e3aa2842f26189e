"""`python -m puzzle_nas` and `torchrun -m puzzle_nas` are the command `puzzle`."""

from puzzle_nas.cli import main

if __name__ == "__main__":
    main()
