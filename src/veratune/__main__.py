"""python -m veratune: the same as the command veratune."""

import sys

from veratune.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
