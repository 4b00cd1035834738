"""Write the cards of the distributed models anew: ``python -m vitreg_hub.model_cards [--measure]``."""

from argparse import ArgumentParser

from vitreg_hub.model_cards.distributed import measure_shipped, write_cards

parser = ArgumentParser(prog="python -m vitreg_hub.model_cards", description=__doc__)
parser.add_argument("--measure", action="store_true", help="first measure the shipped models anew")
if parser.parse_args().measure:
    measure_shipped()
write_cards()
