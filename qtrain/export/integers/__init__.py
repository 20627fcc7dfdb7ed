"""What formats of integer weights share: which layer gets which spec, and the codes where none were trained."""
