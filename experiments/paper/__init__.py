"""The paper's figures: named runs, what they cost, their logs, and the page made of these."""
