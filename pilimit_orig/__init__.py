"""The π-MLP of Yang, Santacroce & Hu (2022) written plainly from the paper: the oracle that the
library is compared with.

Arrays in dictionaries and gradients by hand: no autograd, no nn.Module. It imports torch and numpy
and nothing of pilimit_lib.
"""
