"""`python -m tesaiot_connect` is the command."""

from .cli import main

main()
