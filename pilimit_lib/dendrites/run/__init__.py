"""One growing training: phases, state, tables and plots."""
