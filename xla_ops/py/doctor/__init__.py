"""`python -m xla_ops doctor`: what is installed, what works, how to mend the rest."""
