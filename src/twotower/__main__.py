"""`python -m twotower`, which torchrun starts too: torchrun --nproc-per-node 8 -m twotower train …"""

from twotower.cli.main import app

app()
