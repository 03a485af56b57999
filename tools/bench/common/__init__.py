"""What benches share: timing, synthetic training states, files of figures."""
