"""``python -m graphsplit.cli``, for where the console script is not on the path."""

from graphsplit.cli.root import main

if __name__ == "__main__":
    main()
