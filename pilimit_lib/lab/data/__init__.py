"""Samples under observation: data sets, loaders, and the ledger of what happened to each."""
