"""`python -m graphq` is `graphq`."""

from graphq.cli import main

if __name__ == "__main__":
    main()
