"""One self-contained HTML page about a run: nothing is fetched from a network, nothing is
executed. The page needs matplotlib, so `page` is imported where it is written."""
