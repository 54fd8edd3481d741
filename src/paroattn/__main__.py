"""`python -m paroattn`, as torchrun starts it."""

from paroattn.cli import main

if __name__ == "__main__":
    main()
