"""This project and its peers, measured side by side on the machine at hand: ``make bench``."""
