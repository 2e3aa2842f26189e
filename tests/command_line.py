"""The real command line, but speeds are checked once.

Timed again, tiny models would now and then be found much faster than asked, and another child searched.
"""

from puzzle_nas import effort
from puzzle_nas.cli import main

effort.SPEED_ATTEMPTS = 1

if __name__ == "__main__":
    main()
