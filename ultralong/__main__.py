"""`python -m ultralong` is the command `ultralong`."""

from ultralong.cli import main

if __name__ == "__main__":
    main()
