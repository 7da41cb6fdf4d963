"""`axonn calibrate`: microbenchmarks of this machine, from which a machine file is made."""
