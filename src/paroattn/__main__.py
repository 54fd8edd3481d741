"""`python -m paroattn`, as torchrun starts it."""

from paroattn.cli import main

main()
