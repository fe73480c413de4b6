"""How derivatives are computed: on the tape of autograd, and by operators of the compiler."""
